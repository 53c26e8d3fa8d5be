"""Every bound in one place, units last. Names say what is bounded; comments say where the figure is from."""

# Requests
BODY_BYTES_MAX = 32 * 1024 * 1024  # spec: JSON body 32 MB, beyond it 413
BODY_DEPTH_MAX = 100
BODY_VALUES_MAX = 250_000  # walking them is bounded work on the event loop
BODY_STALL_SECONDS = 20.0  # longest silence inside a body
BODY_GRACE_SECONDS = 30.0  # before a body's average pace counts
BODY_BYTES_PER_SECOND_MIN = 16 * 1024
BODY_FREE_BYTES = 256 * 1024  # of each body; what is beyond shares the budget BODY_MEMORY_BYTES
HEAD_BYTES_MAX = 64 * 1024  # request line and headers
HEAD_SECONDS_MAX = 15.0
KEEP_ALIVE_SECONDS = 75.0
SEND_STALL_SECONDS = 60.0  # a reader that takes nothing for so long is cut off
FILE_BYTES_MAX = 500 * 1024 * 1024  # spec: files, 500 MB each
FILES_PAGE_LIMIT_MAX = 1000  # spec: FileListParams.limit
FILE_IDS_MAX = 100  # spec: FileListParams.ids
PAGE_LIMIT_DEFAULT = 20
PAGE_LIMIT_MAX = 100
EVENTS_PAGE_LIMIT_MAX = 1000
RESOURCES_PAGE_LIMIT_MAX = 1000  # spec: ResourceListParams.limit
EVENTS_PAGE_BYTES_MAX = 16 * 1024 * 1024
METADATA_PAIRS_MAX = 16
METADATA_KEY_CHARS_MAX = 64
METADATA_VALUE_CHARS_MAX = 512
IDEMPOTENCY_KEY_CHARS_MAX = 255
IDEMPOTENCY_SECONDS = 24 * 3600

# Tenancy
WORKSPACES_ACTIVE_MAX = 100  # spec: active workspaces of an organisation
KEYS_ACTIVE_MAX = 1000  # assumed: active keys of a workspace, environment keys included
ADMIN_PAGE_LIMIT_MAX = 1000  # spec: APIKeyListParams.limit
WORKSPACE_IDS_MAX = 100  # spec: WorkspaceListParams.ids
RATE_LIMIT_VALUE_MAX = 1_000_000_000
RATE_LIMIT_WAIT_SECONDS = 5.0  # for a block of budget, before a request is told to come back

# The log
EVENTS_PER_SEND_MAX = 50  # assumed: mirrors initial_events
INBOX_EVENTS_MAX = 1000
APPEND_BATCH_EVENTS_MAX = 512
APPEND_SECONDS_MAX = 30.0
LOCK_TIMEOUT_SECONDS = 5.0
SUBSCRIBER_BUFFER_EVENTS_MAX = 1000
STREAM_HEARTBEAT_SECONDS = 10.0  # observed: proxies cut streams after about 16 s of silence
POLL_SECONDS = 1.0

# Crashes
CRASHES_MAX = 5  # of a session in a row, without progress between; then its turn is given up
CRASH_DELAY_FIRST_SECONDS = 2.0  # after a failure of our own, doubling with each; a death costs nothing at first
CRASH_DELAY_SECONDS_MAX = 60.0

# The database
DATABASE_CONNECT_SECONDS = 10.0
DATABASE_STATEMENT_SECONDS = 30.0
FROZEN_SECONDS = 10.0  # no transaction of ours waits for anything but the database: beyond it its process is frozen

# Sandboxes
SANDBOX_STATE_SECONDS = 30 * 24 * 3600.0  # observed: from the sandbox's creation, activity does not extend it
SNAPSHOT_BYTES_MAX = 16 * 1024 * 1024 * 1024  # compressed; a disk has 10 GB by default
SNAPSHOT_SECONDS_MAX = 240.0
RESTORE_SECONDS_MAX = 600.0
PACKAGES_SECONDS_MAX = 1800.0  # to install what an environment asks for
PACKAGES_DISK_BYTES = 10 * 1024**3  # that one install may write
PACKAGES_IMAGES_BYTES = 50 * 1024**3  # of all images with packages on a host

# Cached clones of repositories
CLONE_BYTES_MAX = 512 * 1024 * 1024  # what is larger is cloned from its host each time
CLONE_REFS_BYTES_MAX = 8 * 1024 * 1024  # the names of its branches and tags: about 100,000 of them
CLONE_FRESH_SECONDS = 24 * 3600.0  # older ones are replaced at their next use
CLONE_UNUSED_SECONDS = 14 * 24 * 3600.0  # then they go
CLONE_TRANSFER_SECONDS_MAX = 120.0  # into a sandbox, or out of one

# The model
MODEL_CONNECT_SECONDS = 10.0
MODEL_STALL_SECONDS = 120.0  # longest silence inside a response
MODEL_REQUEST_SECONDS = 1800.0
MODEL_TRIES_MAX = 5
MODEL_BACKOFF_FIRST_SECONDS = 1.0
MODEL_BACKOFF_MAX_SECONDS = 60.0
MODEL_RETRY_AFTER_MAX_SECONDS = 900.0  # the longest wait that an endpoint may ask for
TOOL_ROUNDS_PER_TURN_MAX = 300
CONTINUATIONS_IN_A_ROW_MAX = 4  # of responses cut off at their output limit
PAUSES_IN_A_ROW_MAX = 8  # of responses that the endpoint paused; from the second on each waits before it is continued
COMPACTIONS_IN_A_ROW_MAX = 3

# Outputs of a session; each is at most FILE_BYTES_MAX
OUTPUT_FILES_MAX = 1000  # assumed: the hosted limit is undocumented
OUTPUT_BYTES_MAX = 20 * 1024 * 1024 * 1024  # of all together

# Tools
TOOL_CALL_SECONDS_DEFAULT = 120.0  # SDK reference runner
TOOL_CALL_SECONDS_MAX = 600.0
BASH_OUTPUT_BYTES_MAX = 100 * 1024
SPILL_CHARS = 100_000
