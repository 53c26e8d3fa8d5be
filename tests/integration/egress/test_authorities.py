"""EXTRA_CA: what sandboxes trust beside the usual authorities."""

import ssl
import subprocess
from pathlib import Path

import pytest

from managed_agents.core.settings import Settings
from managed_agents.egress import authority, tls
from managed_agents.processes.egress import ca_bundle
from managed_agents.processes.settings import CannotStart
from managed_agents.processes.worker import sandbox_spec
from managed_agents.sandbox import layout


def _authority(directory: Path) -> Path:
    made = directory / "extra.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=Extra of the tests", "-keyout", str(directory / "key.pem"), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return made


@pytest.mark.requirement("ENV-052")
def test_the_bundle_holds_the_usual_ones_and_the_operators(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", extra_ca=_authority(tmp_path))
    bundle = sandbox_spec(settings)("sbx_1", 1, "sesn_1").ca_bundle
    assert bundle is not None
    context = ssl.create_default_context(cafile=str(bundle))
    subjects = {str(found["subject"]) for found in context.get_ca_certs()}
    assert any("Extra of the tests" in subject for subject in subjects)
    assert len(subjects) > 1
    assert bundle.stat().st_mode & 0o777 == 0o644
    assert layout.certificate_environment("/x")["PIP_CERT"] == "/x"


def test_this_hosts_authority_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    first, second = (sandbox_spec(settings)("sbx_1", 1, "sesn_1").ca_bundle for _ in range(2))
    assert first is not None
    assert first == second
    made = authority.load(settings.data_dir)
    assert made.pem in first.read_text()
    key = settings.data_dir / tls.AUTHORITY_DIRECTORY / "key.pem"
    assert (key.stat().st_mode & 0o777, key.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "PRIVATE" not in first.read_text()
    assert sorted(path.name for path in settings.data_dir.iterdir()) == [
        "ca-bundle.p12",
        "ca-bundle.pem",
        tls.AUTHORITY_DIRECTORY,
    ]
    key.write_text("nonsense")
    first.unlink()
    with pytest.raises(CannotStart, match="certificate authority of the egress gateway"):
        ca_bundle(settings)


@pytest.mark.requirement("ENV-052")
def test_what_is_no_certificate_is_told_at_the_start(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nonsense")
    for path in (wrong, tmp_path / "missing.pem"):
        with pytest.raises(CannotStart, match="MANAGED_AGENTS_EXTRA_CA"):
            ca_bundle(Settings(data_dir=tmp_path, extra_ca=path))
