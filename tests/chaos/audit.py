"""A watch that the harness puts into the database: it reports steps of its history that must not be.

Triggers see what a look at the end cannot: a terminal row that was taken back,
and a lease that was expired although its session had been renewed meanwhile.
"""

from __future__ import annotations

WATCH = """
CREATE TABLE chaos_report (at timestamptz NOT NULL DEFAULT clock_timestamp(), text text NOT NULL);

CREATE FUNCTION chaos_terminal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.final_state IS NOT NULL THEN
        INSERT INTO chaos_report (text)
        VALUES (format('job %s: its end with lease %s was taken back (%s)', OLD.job_id, OLD.lease_id, TG_OP));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_terminal AFTER UPDATE OR DELETE ON attempt FOR EACH ROW EXECUTE FUNCTION chaos_terminal();

CREATE FUNCTION chaos_expired() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    renewed bigint;
    present bigint;
BEGIN
    -- Told from an end by the agent's word by the error that only expiry writes.
    IF OLD.phase IN (2, 3) AND EXISTS (
        SELECT FROM attempt
        WHERE job_id = OLD.job_id AND lease_id = OLD.lease_id
            AND position('LEASE_EXPIRED' IN encode(error, 'escape')) > 0
    ) THEN
        SELECT renewed_at INTO renewed FROM session WHERE id = OLD.session_id AND NOT host_gone;
        SELECT clock INTO present FROM leader;
        IF renewed + OLD.ttl_ms + 1000 + OLD.ttl_ms / 50 >= present THEN
            INSERT INTO chaos_report (text)
            VALUES (format(
                'lease %s was expired at %s, but its session had been renewed at %s', OLD.lease_id, present, renewed
            ));
        END IF;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_expired AFTER DELETE ON lease FOR EACH ROW EXECUTE FUNCTION chaos_expired();
"""
"""DDL, for a migrated database."""

REPORTS = "SELECT text FROM chaos_report ORDER BY at"
"""What was seen."""
