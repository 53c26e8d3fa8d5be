"""Ways to more rights: capabilities, namespaces, mounts, tracing, devices, /proc and /sys. None is open."""

import pytest

from tests.hostile.conftest import Say
from tests.integration.sandbox.contract import Bench

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

# Number on x86-64 → what it would take to escape. Each must fail; none may kill the shell.
CALLS = {
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "fsopen": 430, "open_tree": 428,
    "move_mount": 429, "mount_setattr": 442, "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249,
    "open_by_handle_at": 304, "name_to_handle_at": 303, "io_uring_setup": 425, "process_vm_readv": 310, "process_vm_writev": 311,
    "pidfd_getfd": 438, "kcmp": 312, "reboot": 169, "settimeofday": 164, "clock_settime": 227, "sethostname": 170, "swapon": 167,
    "acct": 163, "quotactl": 179, "syslog": 103, "iopl": 172, "ioperm": 173, "fanotify_init": 300, "mbind": 237, "sysfs": 139,
    "lookup_dcookie": 212, "personality_ro": 0,
}  # fmt: skip


@pytest.mark.requirement("ENV-043")
async def test_commands_have_no_capability_and_can_get_none(say: Say) -> None:
    said = await say("""
        grep -E 'Cap(Eff|Prm|Inh|Amb)' /proc/self/status; grep NoNewPrivs /proc/self/status; grep Seccomp: /proc/self/status
        su -c id 2>&1 </dev/null; sudo -n id 2>&1; python3 -c 'import os; os.setuid(0)' 2>&1 | tail -1
        python3 -c 'import os; os.setgroups([0])' 2>&1 | tail -1; id -G
    """)
    assert said.count("0000000000000000") == 4
    assert "NoNewPrivs:\t1" in said
    assert "Seccomp:\t2" in said
    assert "uid=0" not in said
    assert said.count("Operation not permitted") >= 2
    assert int(said.split()[-1]) >= 64000


async def test_no_system_call_opens_a_way_out(say: Say) -> None:
    calls = {name: number for name, number in CALLS.items() if number}
    said = await say(f"""python3 - <<'END'
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {calls}.items():
    ctypes.set_errno(0)
    answer = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    if answer != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        print("OPEN", name, answer, errno.errorcode.get(ctypes.get_errno()))
for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    if libc.syscall(56, bit | 17, 0, 0, 0, 0) != -1: print("OPEN clone", hex(bit))
if libc.syscall(435, 0, 0) != -1 or ctypes.get_errno() != errno.ENOSYS: print("OPEN clone3")
import fcntl, os
for request in (0x5412, 0x541C):
    try: fcntl.ioctl(0, request, b"x"); print("OPEN ioctl", hex(request))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTTY): print("OPEN?", error)
print("tried")
END""")
    assert said == "tried\n"


async def test_other_machine_languages_are_filtered_too(say: Say) -> None:
    """A 32-bit system call has other numbers: int 0x80 from 64-bit code must not get round the filter."""
    said = await say("""python3 - <<'END'
import ctypes, mmap, os
# mov eax, 21 (mount in the 32-bit table); xor ebx..edi; int 0x80; ret
code = bytes.fromhex("b815000000" "31db" "31c9" "31d2" "31f6" "31ff" "cd80" "c3")
pid = os.fork()
if pid == 0:
    area = mmap.mmap(-1, 4096, prot=7); area.write(code)
    answer = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))()
    os._exit(0 if answer in (-1, -38, -14) else 1)
_, status = os.waitpid(pid, 0)
print("refused" if status == 0 or os.WIFSIGNALED(status) else "OPEN")
END""")
    assert said == "refused\n"


async def test_devices_are_the_harmless_ones(say: Say) -> None:
    said = await say("""
        ls /dev; for d in mem kmem port sda vda loop0 kvm fuse net/tun kmsg; do test -e /dev/$d && echo "THERE $d"; done
        for n in '1 1' '8 0' '7 0' '10 229'; do
          for kind in b c; do mknod /tmp/dev $kind $n 2>/dev/null && echo MADE; done
        done
        grep -E ' /(workspace|tmp|home|mnt)' /proc/mounts | grep -c -v nodev; true
    """)
    assert "THERE" not in said
    assert "MADE" not in said
    assert said.rstrip().endswith("\n0")


async def test_the_kernels_own_files_cannot_be_written(say: Say) -> None:
    said = await say("""
        for f in /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sysrq-trigger /proc/sys/vm/overcommit_memory \
            /sys/kernel/uevent_helper /sys/fs/cgroup/release_agent /sys/fs/cgroup/*/release_agent /sys/fs/cgroup/cgroup.procs \
            /sys/fs/cgroup/*/cgroup.procs /sys/fs/cgroup/memory*/memory.limit_in_bytes /sys/fs/cgroup/memory.max \
            /proc/1/oom_score_adj /proc/self/uid_map /proc/self/setgroups /proc/bus/pci /proc/kcore /proc/kmem; do
          [ -e "$f" ] && (echo 1 > "$f") 2>/dev/null && echo "WRITTEN $f"
        done
        for f in /proc/kcore /proc/kmsg /proc/timer_list /proc/keys /sys/firmware/efi /sys/kernel/debug/tracing; do
          [ -s "$f" ] && [ "$(head -c 1 $f 2>/dev/null | wc -c)" = 1 ] && echo "READ $f"
        done
        echo 0 > /proc/self/oom_score_adj 2>/dev/null && echo LOWERED; echo END
    """)
    # A command may take its raised score back to the runner's; of two alike the kernel ends the one with more memory.
    assert said in ("LOWERED\nEND\n", "END\n")


async def test_the_root_file_system_and_the_code_of_the_runner_are_read_only(say: Say) -> None:
    said = await say("""
        for d in / /etc /usr/bin /opt/managed-agents /opt/managed-agents/runner /run /run/managed-agents /var/tmp /root /sys; do
          touch $d/x 2>/dev/null && echo "WRITTEN $d"
        done
        find / -xdev -writable -not -type l 2>/dev/null | grep -vxE '/workspace|/tmp|/home/agent'; echo END
    """)
    assert said == "END\n"


async def test_the_engines_own_settings_of_the_container(bench: Bench) -> None:
    """What the tests above show from inside, as the engine has it; for what no attempt could show."""
    import aiodocker

    async with aiodocker.Docker() as docker:
        container = await docker.containers.get(f"ma-{bench.installation}-sbx_attacker.1")
    config = container["HostConfig"]
    assert not config["Privileged"]
    assert config["CapDrop"] == ["ALL"]
    assert {name.removeprefix("CAP_") for name in config["CapAdd"]} == {"SETUID", "SETGID", "KILL"}
    assert (config["NetworkMode"], config["PidMode"], config["IpcMode"], config["UTSMode"]) == ("none", "", "private", "")
    assert config["ReadonlyRootfs"]
    assert not config["Devices"]
    assert not [bind for bind in config["Binds"] if "docker.sock" in bind]
    assert config["OomKillDisable"] in (False, None)
