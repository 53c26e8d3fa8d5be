"""Settings: environment variables `MANAGED_AGENTS_*`, same names as the command-line flags.

The names are fixed: other programs rely on them. docs/settings.md lists them and a test compares the two.
"""

import os
import socket
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from managed_agents.core import addresses, limits


def default_data_dir() -> Path:
    """Per-user data directory; as root `/var/lib/managed-agents`."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/managed-agents")
    return Path(platformdirs.user_data_dir("managed-agents", appauthor=False))


class Settings(BaseSettings):
    """All settings of all processes. Durations are seconds, sizes bytes unless a name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="MANAGED_AGENTS_", extra="ignore", frozen=True)

    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8484, ge=0, le=65535, description="Port of the API.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of /metrics, /healthz and /readyz of a worker; none when unset.",
    )
    data_dir: Path = Field(default_factory=default_data_dir, description="Where everything durable is kept.")
    run_dir: Path | None = Field(None, description="Short-lived sockets, one directory a sandbox. Keep it short: 108-byte limit.")
    database_url: SecretStr | None = Field(
        None, description="Postgres, `postgresql://user@host/name`. Embedded Postgres when unset (`up` only)."
    )
    db_pool: int = Field(10, ge=1, le=200, description="Database connections per process.")
    sandbox: Literal["docker", "local"] = Field("docker", description="Sandbox backend.")
    sandbox_image: str = Field("managed-agents-sandbox:latest", description="Image of docker sandboxes.")
    sandbox_runtime: str | None = Field(None, description="OCI runtime passed to Docker (`runsc`, …).")
    sandbox_uid_base: int = Field(64000, ge=1000, description="First uid commands run as (plus the slot).")
    sandbox_memory_bytes: int = Field(8 * 1024**3, ge=64 * 1024**2, description="Memory of one sandbox.")
    sandbox_disk_bytes: int = Field(10 * 1024**3, ge=64 * 1024**2, description="Session disk of one sandbox.")
    sandbox_cpus: float = Field(2.0, gt=0, description="CPUs one sandbox may use.")
    sandbox_pids: int = Field(512, ge=16, description="Processes and threads in one sandbox.")
    sandbox_open_files: int = Field(16_384, ge=64, le=1_048_576, description="Files that one process in a sandbox may have open.")
    sandbox_output_bytes: int = Field(64 * 1024**2, ge=1024**2, description="Output kept of one call; the model gets a preview.")
    sandbox_call_seconds: float = Field(
        limits.TOOL_CALL_SECONDS_MAX, gt=0, le=limits.TOOL_CALL_SECONDS_MAX, description="Longest wall time of one call."
    )
    sandbox_environments: Path | None = Field(
        None,
        description="TOML file with a table for each environment's id, read at start: limits other than those above, by their "
        "names without `sandbox_`, and `pool`, the number of sandboxes made ahead.",
    )
    sandbox_running_max: int = Field(
        0, ge=0, description="Sandboxes that run on one host at once; further sessions wait for a place. 0: no bound."
    )
    sandbox_wait_seconds: float = Field(
        600.0, gt=0, description="How long a call waits for such a place before it fails and says so."
    )
    sandbox_pause_seconds: float = Field(
        60.0, gt=0, description="Idle time after which the processes of a sandbox are frozen, until its next call or its stop."
    )
    sandbox_idle_seconds: float = Field(300.0, gt=0, description="Idle time after which a sandbox is stopped.")
    sandbox_parked_seconds: float = Field(
        3600.0, ge=0, description="Time after which a stopped sandbox that is in a snapshot gives its disk back."
    )
    sandbox_snapshot_seconds: float = Field(600.0, gt=0, description="Time between snapshots of a sandbox at work.")
    repository_cache_bytes: int = Field(
        10 * 1024**3,
        ge=0,
        description="Cached clones of repositories that a workspace may have in the blob store. 0: none are kept.",
    )
    host_name: str | None = Field(
        None, min_length=1, description="This host's name, unique among those that share the database; the machine's when unset."
    )
    packages_network: str = Field(
        "none",
        description="Engine network in which packages of environments are installed: what they install may run anything there.",
    )
    packages_environment: str = Field(
        "", description="Environment of those installs, `NAME=value` separated by spaces: index URLs, proxies."
    )
    packages_seconds: float = Field(limits.PACKAGES_SECONDS_MAX, gt=0, description="Longest time that installs may take.")
    packages_disk_bytes: int = Field(
        limits.PACKAGES_DISK_BYTES, ge=1024**2, description="What one install may write to disk; beyond it it fails and says so."
    )
    packages_images_bytes: int = Field(
        limits.PACKAGES_IMAGES_BYTES,
        ge=0,
        description="Size of all images with packages on one host, without their base; beyond it the longest unused ones go.",
    )
    local_sandbox_unsafe: bool = Field(
        False, description="Allow the unisolated `local` backend with a model URL that is not loopback."
    )
    extra_ca: Path | None = Field(None, description="Extra CA bundle for sandboxes and image builds.")
    egress: Literal["on", "off"] = Field(
        "on", description="Whether a worker serves the network of its host's sandboxes; `off` where `egress` runs by itself."
    )
    egress_allowed_networks: str = Field(
        "", description="Networks beside the public ones that sandboxes may reach, as CIDR, comma separated."
    )
    egress_routes: str = Field(
        "",
        description="Where connections of sandboxes really go, `host:port=host:port`, comma separated: for mirrors and tests. "
        "The address must be allowed all the same, and the server there show the first host's certificate.",
    )
    egress_package_hosts: str = Field(
        "",
        description="More hosts that `allow_package_managers` opens, comma separated, `*.name` for what is below a name: source "
        "hosts, download servers.",
    )
    egress_connections: int = Field(256, ge=1, description="Network connections of one sandbox at once.")
    egress_bytes: int = Field(100 * 1024**3, ge=1, description="Network traffic of one session in its life, both directions.")
    model_base_url: str | None = Field(None, description="Messages API base URL; wins over everything.")
    model_api_key: SecretStr | None = Field(None, description="Key for MODEL_BASE_URL; else ANTHROPIC_API_KEY.")
    web_search: str | None = Field(
        None,
        pattern=r"^(messages-api|brave|(searxng|brave)\+https?://[^\s]+)$",
        description="Who answers `web_search`: `messages-api`, `brave` or `searxng+URL`; nobody when unset. The same for `api` "
        "and `worker`.",
    )
    web_search_api_key: SecretStr | None = Field(None, description="Key of the search provider, where it takes one (Brave).")
    web_allowed_networks: str = Field(
        "", description="Networks beside the public ones that `web_fetch` may reach, as CIDR, comma separated."
    )
    web_networking: Literal["on", "off"] = Field(
        "on",
        description="Whether `allowed_hosts` of a `limited` environment bounds `web_fetch` and `web_search` too.",
    )
    script: Path | None = Field(
        None, description="Script of the scripted model, where `up` starts it because no model is configured."
    )
    blob_store: str | None = Field(None, description="Blob store URL; `DATA_DIR/blobs` when unset.")
    master_key_file: Path | None = Field(None, description="Master key; `DATA_DIR/master.key` when unset.")
    api_key: SecretStr | None = Field(None, description="The first API key; generated when absent.")
    lease_ttl_seconds: float = Field(15.0, gt=0, description="A worker silent for longer is dead.")
    harnesses: str = Field(
        "",
        description="More harnesses for agents to choose by their metadata `managed_agents.harness`: `name=module:object`, "
        "comma separated; the object is called without arguments.",
    )
    drain_seconds: float = Field(
        20.0,
        ge=0,
        le=3600,
        description="How long a worker that was told to stop waits for model requests and tool calls under way before it "
        "gives them up; sessions go to other workers step by step. `up` does not wait: it ends them all.",
    )
    worker_turns: int = Field(200, ge=1, description="Sessions one worker runs at once.")
    rate_limits: Literal["on", "off"] = Field("on", description="Whether requests are counted against rate limits.")
    rate_limit_creates_per_minute: int = Field(300, ge=1, description="Create requests of the organisation in any minute.")
    rate_limit_reads_per_minute: int = Field(1200, ge=1, description="Read requests of the organisation in any minute.")
    connections: int = Field(2000, ge=1, description="Open connections one api process takes; more are turned away with 529.")
    streams: int = Field(1000, ge=1, description="Open event streams of one workspace in one api process; more are answered 429.")
    body_memory_bytes: int = Field(
        256 * 1024**2, ge=64 * 1024**2, description="Memory of all large JSON bodies at once in one api process; beyond it 529."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    require_beta_header: bool = Field(True, description="404 without the beta header, as the hosted API.")
    faults: str = Field("", description="Armed fault points (tests only).")

    @field_validator("data_dir", "run_dir", "extra_ca", "script", "master_key_file", "sandbox_environments", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().absolute() if value is not None else None

    @field_validator("web_allowed_networks", "egress_allowed_networks", mode="after")
    @classmethod
    def _networks(cls, value: str) -> str:
        addresses.networks(value)
        return value

    @field_validator("database_url", mode="after")
    @classmethod
    def _postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("it begins with postgresql://")  # without the value: it holds a password
        return value

    @property
    def effective_host_name(self) -> str:
        """`HOST_NAME`, or the machine's."""
        return self.host_name or socket.gethostname()

    @property
    def effective_run_dir(self) -> Path:
        """`RUN_DIR`, or `run` below the data directory."""
        return self.run_dir or self.data_dir / "run"

    @property
    def effective_blob_store(self) -> str:
        """`BLOB_STORE`, or a local directory below the data directory."""
        return self.blob_store or f"file://{self.data_dir / 'blobs'}"

    @property
    def effective_master_key_file(self) -> Path:
        """`MASTER_KEY_FILE`, or `master.key` below the data directory."""
        return self.master_key_file or self.data_dir / "master.key"
