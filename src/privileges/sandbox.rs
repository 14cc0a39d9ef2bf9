//! Implements the sandbox of a worker: Landlock restricts files, seccomp restricts system calls. Both apply permanently
//! to the process and all its children.
//!
//! Landlock: files below `READ` and the paths of `--sandbox-read` can be read; files below `WRITE` and the paths of `--sandbox-write` can
//! also be written; nothing else can be opened. Files that are already open stay usable: sockets, the segment, files that the application
//! opened in `preload`. No TCP port can be bound; no outside process can be signalled, or reached over an abstract socket.
//!
//! Seccomp: a list of allowed system calls. A refused call returns an error, and its name is logged.
//!
//! This code must not run between fork and exec of a program, because it allocates memory.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::{drop_calls, sandbox_syscalls};
use crate::config::privileges::SandboxConfig;

/// Paths that libraries read: code, certificates, names of hosts, users and time zones, and kernel information.
const READ: [&str; 33] = [
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/nix/store",
    "/proc",
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
    "/dev/urandom",
    "/dev/random",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/hostname",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/passwd",
    "/etc/group",
    "/etc/localtime",
    "/etc/timezone",
    "/etc/mime.types",
    "/etc/locale.alias",
    "/run/systemd/resolve",
    "/var/run/nscd",
];
const WRITE: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/full"];

/// Checks that this kernel supports the sandbox, and that the paths given by the operator exist. Returns a message for
/// each problem.
pub(super) fn check(config: &SandboxConfig, root: &Path) -> Vec<String> {
    let read = config.read.iter().map(|path| ("--sandbox-read", path));
    let named = read.chain(config.write.iter().map(|path| ("--sandbox-write", path)));
    let missing = named.filter_map(|(flag, path)| {
        let error = root.join(path.strip_prefix("/").unwrap_or(path)).metadata().err()?;
        Some(format!("{flag} {}: {error} (it must exist at the start)", path.display()))
    });
    let filters = filters().err().map(|error| format!("--sandbox: {error}"));
    let ruleset = ruleset(config.required).err().map(|error| {
        format!(
            "--sandbox: this kernel has no Landlock, or is older than Linux 6.2: {error} (use --sandbox=best-effort to apply what \
             the kernel supports)"
        )
    });
    missing.chain(filters).chain(ruleset).collect()
}

/// Confines this thread, and all threads and processes that it starts later.
///
/// # Errors
/// Returns a message for the operator if the kernel does not support a part of the sandbox, or a path is missing.
pub(super) fn enter(config: &SandboxConfig) -> Result<(), String> {
    restrict_files(config).map_err(|error| format!("--sandbox: {error}"))?;
    drop_calls::report_refused_calls().map_err(|error| format!("--sandbox: {error}"))?;
    for filter in filters()? {
        seccompiler::apply_filter(&filter).map_err(|error| format!("--sandbox: {error}"))?;
    }
    Ok(())
}

fn ruleset(required: bool) -> Result<RulesetCreated, landlock::RulesetError> {
    let level = if required { CompatLevel::HardRequirement } else { CompatLevel::BestEffort };
    Ruleset::default()
        .set_compatibility(level)
        .handle_access(AccessFs::from_all(ABI::V3))?
        // Features of later kernels are used only if they are available.
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()
}

fn restrict_files(config: &SandboxConfig) -> Result<(), String> {
    let failed = |error: landlock::RulesetError| error.to_string();
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let no_devices = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock;
    let write = AccessFs::from_all(ABI::V6) & !no_devices;
    let mut rules = ruleset(config.required).map_err(failed)?;
    // The program's own file is needed for its backtraces.
    let own = std::env::current_exe().ok();
    let system = READ.iter().map(Path::new).chain(own.as_deref());
    rules = rules.add_rules(landlock::path_beneath_rules(system, read)).map_err(failed)?;
    rules = rules.add_rules(landlock::path_beneath_rules(WRITE, read | AccessFs::WriteFile)).map_err(failed)?;
    for (paths, access, flag) in [(&config.read, read, "--sandbox-read"), (&config.write, write, "--sandbox-write")] {
        for path in paths {
            let opened = PathFd::new(path).map_err(|error| format!("{flag}: {error}"))?;
            let access = if path.is_dir() { access } else { access & AccessFs::from_file(ABI::V6) };
            rules = rules.add_rule(PathBeneath::new(opened, access)).map_err(failed)?;
        }
    }
    let status = rules.restrict_self().map_err(failed)?;
    if config.required && status.ruleset == RulesetStatus::NotEnforced {
        return Err("the kernel does not enforce the rules for files".to_owned());
    }
    Ok(())
}

/// Returns the filters, in the order in which they are installed. If their results differ, the kernel applies the
/// strictest one.
fn filters() -> Result<Vec<BpfProgram>, String> {
    let machine = std::env::consts::ARCH;
    if !["x86_64", "aarch64"].contains(&machine) {
        return Err(format!("it is not supported on {machine}"));
    }
    let machine: TargetArch = machine.try_into().map_err(|error| format!("{error}"))?;
    let filter = |rules: BTreeMap<i64, Vec<SeccompRule>>, matched: SeccompAction, else_: SeccompAction| {
        let filter = SeccompFilter::new(rules, else_, matched, machine).map_err(|error| error.to_string())?;
        BpfProgram::try_from(filter).map_err(|error| error.to_string())
    };
    let whole = |calls: &[i64]| calls.iter().map(|&call| (call, Vec::new())).collect();
    // The C library makes these calls as a probe, or in places where a signal could not report them. They fail
    // silently.
    let errno = |number: i32| SeccompAction::Errno(number.cast_unsigned());
    let tried = [libc::SYS_clone3, libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
    let executed = [libc::SYS_execve, libc::SYS_execveat];
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> =
        sandbox_syscalls::allowed().map(|call| (call, Vec::new())).collect();
    allowed.extend(tried.map(|call| (call, Vec::new())));
    allowed.extend(conditional().map_err(|error| error.to_string())?);
    Ok(vec![
        filter(whole(&tried), errno(libc::ENOSYS), SeccompAction::Allow)?,
        filter(whole(&executed), errno(libc::EPERM), SeccompAction::Allow)?,
        filter(allowed, SeccompAction::Allow, SeccompAction::Trap)?,
    ])
}

/// Returns the calls that are allowed with certain arguments only.
fn conditional() -> Result<[(i64, Vec<SeccompRule>); 3], seccompiler::BackendError> {
    let word = |argument, operator, value: i32| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, u64::from(value.cast_unsigned()))
    };
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let no_namespace = SeccompCmpOp::MaskedEq(u64::from(namespaces.cast_unsigned()));
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let families = families.map(|family| SeccompRule::new(vec![word(0, SeccompCmpOp::Eq, family)?]));
    // A process that can push characters into a terminal's input can type commands there.
    let (push, console) = (i32::try_from(libc::TIOCSTI).unwrap_or(0), 0x541c);
    Ok([
        (libc::SYS_clone, vec![SeccompRule::new(vec![word(0, no_namespace, 0)?])?]),
        (libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?),
        (
            libc::SYS_ioctl,
            vec![SeccompRule::new(vec![word(1, SeccompCmpOp::Ne, push)?, word(1, SeccompCmpOp::Ne, console)?])?],
        ),
    ])
}
