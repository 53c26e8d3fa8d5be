"""Pack the demo's project: one reproducible tar.gz, its dependencies as wheels inside."""

import base64
import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

SOURCE = Path(__file__).with_name("demo_project")
SCRIPT = Path(__file__).with_name("demo_script.py")
ROOT = "readability"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def project() -> bytes:
    """The archive that the demo uploads. The same bytes every time."""
    files = {str(path.relative_to(SOURCE / "audited")): path.read_bytes() for path in _files(SOURCE / "audited")}
    for package in sorted(path for path in SOURCE.iterdir() if path.is_dir() and "-" in path.name):
        name, _, version = package.name.rpartition("-")
        files[f"wheelhouse/{name}-{version}-py3-none-any.whl"] = wheel(package, name, version)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(files):
            member = tarfile.TarInfo(f"{ROOT}/{name}")
            member.size, member.mode = len(files[name]), 0o644
            archive.addfile(member, io.BytesIO(files[name]))
    return gzip.compress(raw.getvalue(), mtime=0)


def wheel(folder: Path, name: str, version: str) -> bytes:
    """A pure Python wheel of the packages in `folder`."""
    info = f"{name}-{version}.dist-info"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: demo\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path, _EPOCH), data)
    return raw.getvalue()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
