-- The rows of ready and delayed whose jobs still wait since the leases of `said`
-- (job_id, lease_id), locked in job order: nobody took them meanwhile.
from_ready AS MATERIALIZED (
    SELECT r.*
    FROM ready AS r
    JOIN said AS s ON s.job_id = r.job_id AND s.lease_id = r.last_lease_id
    WHERE r.job_id = ANY (ARRAY(SELECT job_id FROM said))
    ORDER BY r.job_id
    FOR UPDATE OF r
),
from_delayed AS MATERIALIZED (
    SELECT d.*
    FROM delayed AS d
    JOIN said AS s ON s.job_id = d.job_id AND s.lease_id = d.last_lease_id
    WHERE d.job_id = ANY (ARRAY(SELECT job_id FROM said))
    ORDER BY d.job_id
    FOR UPDATE OF d
)
