"""Our seccomp profile: what commands may not ask of the kernel even without capabilities.

Old engines allow io_uring, which escapes all other syscall filtering; newer kernels grow calls old engines
do not know. User namespaces are refused because they hand out capabilities over a large attack surface.
`clone3` answers "no such call", because its flags cannot be inspected and the C library then falls back to
`clone`.
"""

from typing import Any

EPERM = 1
ENOSYS = 38
CLONE_NEW_ANY = 0x7E020000  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
TIOCSTI = 0x5412
TIOCLINUX = 0x541C
AF_ALG = 38
AF_VSOCK = 40

_REFUSED = (
    # io_uring
    *("io_uring_setup", "io_uring_enter", "io_uring_register"),
    # namespaces and mounts
    *("unshare", "setns", "mount", "umount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree"),
    *("open_tree_attr", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "listmount", "statmount"),
    # the kernel itself
    *("init_module", "finit_module", "delete_module", "create_module", "query_module", "get_kernel_syms"),
    *(
        "kexec_load",
        "kexec_file_load",
        "reboot",
        "swapon",
        "swapoff",
        "acct",
        "quotactl",
        "quotactl_fd",
        "syslog",
    ),
    *("bpf", "perf_event_open", "lookup_dcookie", "userfaultfd", "nfsservctl", "vhangup", "uselib", "sysfs"),
    *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "stime", "iopl", "ioperm", "modify_ldt"),
    *("vm86", "vm86old", "_sysctl", "ustat", "sethostname", "setdomainname", "fanotify_init"),
    # keys, which are not bound to a namespace
    *("add_key", "request_key", "keyctl"),
    # files by handle instead of by path
    *("open_by_handle_at", "name_to_handle_at"),
    # other processes' memory and the placement of memory
    *("process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd", "move_pages"),
    *("migrate_pages", "mbind", "set_mempolicy", "set_mempolicy_home_node"),
)


def profile() -> dict[str, Any]:
    """Return the profile in the engine's JSON form."""
    refuse = {"action": "SCMP_ACT_ERRNO", "errnoRet": EPERM}

    def masked(name: str, index: int, operation: str, value: int, second: int = 0) -> dict[str, Any]:
        argument = {"index": index, "value": value, "valueTwo": second, "op": operation}
        return {"names": [name], **refuse, "args": [argument]}

    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": list(_REFUSED), **refuse},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS},
            # One rule a flag: a masked comparison is for equality, and any one of the flags is refused.
            *(masked("clone", 0, "SCMP_CMP_MASKED_EQ", 1 << bit, 1 << bit) for bit in range(32) if CLONE_NEW_ANY >> bit & 1),
            masked("ioctl", 1, "SCMP_CMP_EQ", TIOCSTI),
            masked("ioctl", 1, "SCMP_CMP_EQ", TIOCLINUX),
            masked("socket", 0, "SCMP_CMP_EQ", AF_ALG),
            masked("socket", 0, "SCMP_CMP_EQ", AF_VSOCK),
        ],
    }
