/* A libnvidia-ml.so.1 without a GPU, so that the real pynvml code runs in tests.
 *
 * It shows eight GPUs. The file named by NVML_STUB_STATE, read anew at each call,
 * changes what they say; each line is "key value":
 *
 *   init 9              what nvmlInit returns
 *   count 4             how many GPUs there are
 *   count_error 999     what nvmlDeviceGetCount returns
 *   3.error 15          what every call about GPU 3 returns (15: the GPU is lost)
 *   3.name_error 3      what one call returns; also uuid_error, memory_error, utilization_error
 *   3.uuid GPU-…        also 3.name, 3.memory_total, 3.memory_used (bytes), 3.utilization (percent)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_GPUS 64
#define VALUE_SIZE 128

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7 };

typedef struct { int index; } device;
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned int gpu, memory; } utilization;

static device devices[MAX_GPUS];
static int users;

static int lookup(const char *key, char *value) {
    const char *path = getenv("NVML_STUB_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    size_t length = strlen(key);
    int found = 0;
    while (file && !found && fgets(line, sizeof line, file))
        if (strncmp(line, key, length) == 0 && line[length] == ' ') {
            line[strcspn(line, "\n")] = 0;
            snprintf(value, VALUE_SIZE, "%s", line + length + 1);
            found = 1;
        }
    if (file) fclose(file);
    return found;
}

static unsigned long long number(const char *key, unsigned long long otherwise) {
    char value[VALUE_SIZE];
    return lookup(key, value) ? strtoull(value, NULL, 10) : otherwise;
}

static unsigned long long of_gpu(device *gpu, const char *what, unsigned long long otherwise) {
    char key[64];
    snprintf(key, sizeof key, "%d.%s", gpu->index, what);
    return number(key, otherwise);
}

static int trouble(device *gpu, const char *call) {
    if (!users) return UNINITIALIZED;
    if (!gpu) return INVALID_ARGUMENT;
    int all = (int)of_gpu(gpu, "error", OK);
    return all ? all : (int)of_gpu(gpu, call, OK);
}

static int text(device *gpu, const char *what, const char *otherwise, char *out, unsigned int size) {
    char key[64], value[VALUE_SIZE];
    snprintf(key, sizeof key, "%d.%s", gpu->index, what);
    if (!lookup(key, value)) snprintf(value, sizeof value, "%s", otherwise);
    if (strlen(value) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return OK;
}

int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    int error = (int)number("init", OK);
    if (!error) users++;
    return error;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    if (!users) return UNINITIALIZED;
    users--;
    return OK;
}

const char *nvmlErrorString(int error) {
    switch (error) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case 3: return "Not Supported";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    default: return "Unknown Error";
    }
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    if (!users) return UNINITIALIZED;
    *count = (unsigned int)number("count", 8);
    return (int)number("count_error", OK);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, device **gpu) {
    if (!users) return UNINITIALIZED;
    if (index >= MAX_GPUS || index >= number("count", 8)) return INVALID_ARGUMENT;
    devices[index].index = (int)index;
    *gpu = &devices[index];
    return trouble(*gpu, "handle_error");
}

int nvmlDeviceGetUUID(device *gpu, char *uuid, unsigned int size) {
    char made[64];
    int error = trouble(gpu, "uuid_error");
    if (error) return error;
    snprintf(made, sizeof made, "GPU-5700b000-0000-4000-8000-%012d", gpu->index);
    return text(gpu, "uuid", made, uuid, size);
}

int nvmlDeviceGetName(device *gpu, char *name, unsigned int size) {
    int error = trouble(gpu, "name_error");
    return error ? error : text(gpu, "name", "NVIDIA H100 80GB HBM3", name, size);
}

int nvmlDeviceGetMemoryInfo(device *gpu, memory *info) {
    int error = trouble(gpu, "memory_error");
    if (error) return error;
    info->total = of_gpu(gpu, "memory_total", 85520809984ULL);
    info->used = of_gpu(gpu, "memory_used", 0);
    info->free = info->total - info->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(device *gpu, utilization *rates) {
    int error = trouble(gpu, "utilization_error");
    if (error) return error;
    rates->gpu = (unsigned int)of_gpu(gpu, "utilization", 0);
    rates->memory = 0;
    return OK;
}
