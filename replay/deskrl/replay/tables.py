"""SQL of the tables of the store; `schema` creates them, and `row_checksums` adds the triggers of their checksums."""

# Screenshots are nearly all of the bytes and are stored in the blob log; `images` has their locations.
# `groups.state`: open -> complete -> bound -> consumed, or open -> closed (too few members).
# `rollouts.state`: planned, leased, finished, faulted. `leases.state`: active, finished, faulted, expired, released.
# Values that episodes are searched by have columns of their own and outlive the messages that they come from:
# `termination` (of `result`), `fault_kind` (of `last_fault`), policy versions of the tokens (`lineage` of the last).
# `checksum` is over all other columns of its row (see `row_checksums`); in `images`, over the bytes of the screenshot.
# Task files have hashes instead. A lost row of `images` or `image_uses` means that a screenshot is missing when it is
# read.
# `rollout_plans` repeats what a rollout needs to be played again if its row in `rollouts` is damaged.
# `rollouts.damage` says what was damaged; `damaged_episodes` has the states of such rows.
# Older names: `paced` means rate limited, `begun` means started, `num_expiries` counts expired leases.
TABLES = """
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL, checksum INTEGER) WITHOUT ROWID;
CREATE TABLE policy (lineage TEXT NOT NULL, step INTEGER NOT NULL, checksum INTEGER);
CREATE TABLE task_files (hash BLOB PRIMARY KEY, task_json BLOB NOT NULL) WITHOUT ROWID;

CREATE TABLE groups (
    position INTEGER PRIMARY KEY,
    group_id TEXT NOT NULL UNIQUE,
    queue TEXT NOT NULL,
    task_id TEXT NOT NULL,
    task_hash BLOB NOT NULL REFERENCES task_files (hash),
    max_steps INTEGER NOT NULL,
    temperature REAL NOT NULL,
    acting_policy INTEGER NOT NULL,
    paced INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'open',
    begun INTEGER NOT NULL DEFAULT 0,
    num_planned INTEGER NOT NULL,
    num_leased INTEGER NOT NULL DEFAULT 0,
    num_finished INTEGER NOT NULL DEFAULT 0,
    num_faulted INTEGER NOT NULL DEFAULT 0,
    num_succeeded INTEGER NOT NULL DEFAULT 0,
    num_steps INTEGER NOT NULL DEFAULT 0,
    completion INTEGER,
    batch_id TEXT,
    ordinal INTEGER,
    candidate INTEGER REFERENCES rollouts (id),
    dropped INTEGER NOT NULL DEFAULT 0,
    dropped_because TEXT NOT NULL DEFAULT '',
    used_candidate INTEGER NOT NULL DEFAULT 0,
    checksum INTEGER
);
CREATE INDEX grantable_groups ON groups (paced, begun DESC, position) WHERE num_planned > 0;
CREATE INDEX groups_by_state ON groups (state, queue, completion);
CREATE UNIQUE INDEX bindings ON groups (queue, batch_id, ordinal) WHERE batch_id IS NOT NULL;
CREATE INDEX pending_candidates ON groups (candidate) WHERE candidate IS NOT NULL;

CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY,
    episode_id TEXT NOT NULL UNIQUE,
    group_position INTEGER NOT NULL REFERENCES groups (position),
    member INTEGER NOT NULL,
    seed TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'planned',
    num_faults INTEGER NOT NULL DEFAULT 0,
    num_expiries INTEGER NOT NULL DEFAULT 0,
    num_steps INTEGER NOT NULL DEFAULT 0,
    reward REAL,
    result BLOB,
    last_fault BLOB,
    termination INTEGER,
    fault_kind INTEGER,
    lineage TEXT,
    oldest_version INTEGER,
    newest_version INTEGER,
    ending INTEGER,
    ended_unix_s REAL,
    removable INTEGER NOT NULL DEFAULT 0,
    removed INTEGER NOT NULL DEFAULT 0,
    damage TEXT NOT NULL DEFAULT '',
    checksum INTEGER,
    UNIQUE (group_position, member)
);
CREATE INDEX rollouts_by_ending ON rollouts (ending) WHERE ending IS NOT NULL;
CREATE INDEX removable_rollouts ON rollouts (ending) WHERE removable;

CREATE TABLE rollout_plans (
    rollout INTEGER PRIMARY KEY,
    episode_id TEXT NOT NULL,
    group_position INTEGER NOT NULL,
    member INTEGER NOT NULL,
    seed TEXT NOT NULL,
    checksum INTEGER
);

CREATE TABLE leases (
    lease_id TEXT PRIMARY KEY,
    rollout INTEGER NOT NULL REFERENCES rollouts (id),
    request_id TEXT NOT NULL,
    holder TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'active',
    checksum INTEGER
) WITHOUT ROWID;
CREATE UNIQUE INDEX active_requests ON leases (request_id) WHERE state = 'active';
CREATE UNIQUE INDEX active_rollouts ON leases (rollout) WHERE state = 'active';
CREATE INDEX leases_by_rollout ON leases (rollout);

CREATE TABLE steps (
    id INTEGER PRIMARY KEY,
    rollout INTEGER NOT NULL REFERENCES rollouts (id),
    step INTEGER NOT NULL,
    payload BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    UNIQUE (rollout, step)
);
CREATE TABLE segments (
    number INTEGER PRIMARY KEY,
    num_bytes INTEGER NOT NULL,
    live_bytes INTEGER NOT NULL,
    checksum INTEGER
);
CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    hash BLOB NOT NULL,
    num_bytes INTEGER NOT NULL,
    segment INTEGER NOT NULL REFERENCES segments (number),
    position INTEGER NOT NULL,
    checksum INTEGER
);
CREATE UNIQUE INDEX images_by_hash ON images (hash, num_bytes);
CREATE INDEX images_by_segment ON images (segment);
CREATE TABLE image_uses (rollout INTEGER NOT NULL, image INTEGER NOT NULL, PRIMARY KEY (rollout, image)) WITHOUT ROWID;
CREATE INDEX uses_by_image ON image_uses (image);

CREATE TABLE batches (
    queue TEXT NOT NULL,
    batch_id TEXT NOT NULL,
    committed INTEGER NOT NULL DEFAULT 0,
    lineage TEXT NOT NULL DEFAULT '',
    step INTEGER NOT NULL DEFAULT 0,
    checksum INTEGER,
    PRIMARY KEY (queue, batch_id)
) WITHOUT ROWID;

CREATE TABLE successes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id TEXT NOT NULL,
    rollout INTEGER NOT NULL UNIQUE REFERENCES rollouts (id),
    lineage TEXT NOT NULL,
    step INTEGER NOT NULL,
    checksum INTEGER
);
CREATE INDEX successes_by_task ON successes (task_id, number);
CREATE TABLE success_uses (
    task_id TEXT PRIMARY KEY,
    num_used INTEGER NOT NULL,
    checksum INTEGER
) WITHOUT ROWID;
"""
