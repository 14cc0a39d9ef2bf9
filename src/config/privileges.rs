//! Parses the configured privileges of the application's processes. Each setting is looked up and checked on its own.
//!
//! The master resolves names of users and groups here, before any fork, because a child that changes its user must not
//! look up names. The module `privileges` checks whether the combination of settings can be applied.

use std::ffi::CString;
use std::fmt;
use std::path::PathBuf;

use caps::Capability;
use nix::sys::resource::{RLIM_INFINITY, Resource};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};

use super::{format_size, parse_size};
use crate::sys;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PrivilegesConfig {
    pub(crate) user: Option<Account>,
    pub(crate) group: Option<Gid>,
    pub(crate) supplementary_groups: Option<GroupList>,
    pub(crate) capabilities: Option<CapabilitySet>,
    pub(crate) no_new_privileges: Option<bool>,
    pub(crate) chroot: Option<PathBuf>,
    pub(crate) chdir: Option<PathBuf>,
    pub(crate) umask: Option<u32>,
    pub(crate) limits: Vec<ResourceLimit>,
    pub(crate) nice: Option<i32>,
    pub(crate) affinity: Option<Affinity>,
    pub(crate) variables: Vec<Variable>,
    pub(crate) clear_env: bool,
    /// Owner of Unix socket files.
    pub(crate) socket_owner: Option<Owner>,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) sandbox: Option<SandboxConfig>,
}

impl PrivilegesConfig {
    /// Whether the descriptor limit is configured. If it is not, each worker raises its own limit.
    pub(crate) fn limits_descriptors(&self) -> bool {
        self.limits.iter().any(|limit| limit.resource == Resource::RLIMIT_NOFILE)
    }

    /// Returns a warning if the application runs as root because no user is configured.
    pub(crate) fn of_root(&self) -> Option<&'static str> {
        let is_root = nix::unistd::geteuid().is_root() && is_root_of_machine();
        (is_root && self.user.is_none()).then_some(
            "the application runs as root (choose a user, as in --user www-data, or confirm root with --user root)",
        )
    }

    /// Returns the descriptor limit of a worker, if that is known.
    pub(crate) fn most_descriptors(&self) -> Option<u64> {
        let set = self.limits.iter().rev().find(|limit| limit.resource == Resource::RLIMIT_NOFILE);
        set.map(|limit| limit.soft).or_else(sys::hard_descriptor_limit)
    }

    /// Returns the owner to set for socket files, or `None` if it stays unchanged.
    pub(crate) fn owner_of_sockets(&self) -> Option<Owner> {
        self.socket_owner.or_else(|| self.owner_of_files())
    }

    /// Returns the owner to set for files that workers use, or `None` if it stays unchanged.
    pub(crate) fn owner_of_files(&self) -> Option<Owner> {
        let user = self.user.as_ref()?;
        Some(Owner { user: user.uid, group: self.group.or(user.gid)? })
    }

    /// Returns the variables to set for the application. The variables from `--env` come last and override the others.
    pub(crate) fn environment(&self) -> Vec<Variable> {
        let account = self.user.iter().filter_map(|user| Some((user.name.as_ref()?, user.home.as_ref()?)));
        let account = account.flat_map(|(name, home)| {
            let pairs = [("USER", name), ("LOGNAME", name), ("HOME", home)];
            pairs.map(|(name, value)| Variable { name: name.to_owned(), value: value.clone() })
        });
        account.chain(self.variables.iter().cloned()).collect()
    }
}

/// Whether user 0 is root on the machine. In a user namespace, user 0 can be any user.
fn is_root_of_machine() -> bool {
    let Ok(map) = std::fs::read_to_string("/proc/self/uid_map") else { return true };
    let of_root = map.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    of_root.into_iter().all(|fields| fields.first() != Some(&"0") || fields.get(1) == Some(&"0"))
}

/// A user, with its entry in the system's account database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: Uid,
    /// Primary group; `None` for a number without an account.
    pub(crate) gid: Option<Gid>,
    /// All groups of the user.
    pub(crate) groups: Vec<Gid>,
    pub(crate) name: Option<String>,
    pub(crate) home: Option<String>,
}

/// Owner of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) user: Uid,
    pub(crate) group: Gid,
}

/// Groups by number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupList(pub(crate) Vec<Gid>);

/// Capabilities, one bit each (see capabilities(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CapabilitySet(pub(crate) u64);

/// A limit of setrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResourceLimit {
    pub(crate) resource: Resource,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Affinity {
    /// One processor per process, by slot.
    Spread,
    Processors(Vec<usize>),
}

/// A variable of the environment.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl fmt::Debug for Variable {
    /// Omits the value, which may be a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=…", self.name)
    }
}

/// The files that a sandboxed worker may use in addition to those that every program needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SandboxConfig {
    /// Whether a kernel without Landlock is an error.
    pub(crate) required: bool,
    pub(crate) read: Vec<PathBuf>,
    pub(crate) write: Vec<PathBuf>,
}

/// Reads a user: a name, or a number.
///
/// # Errors
/// Returns a message for the operator if the user cannot be looked up.
pub(crate) fn parse_user(text: &str) -> Result<Account, String> {
    let number = text.parse().ok().map(Uid::from_raw);
    let found = match number {
        Some(uid) => User::from_uid(uid),
        None => User::from_name(text),
    };
    let found = found.map_err(|errno| format!("cannot look up user {text}: {}", errno.desc().to_lowercase()))?;
    match (found, number) {
        (Some(user), _) => {
            let groups = CString::new(user.name.as_str()).map_err(|_| format!("'{text}' is not a user name"))?;
            let groups = getgrouplist(&groups, user.gid)
                .map_err(|errno| format!("cannot look up the groups of {text}: {}", errno.desc().to_lowercase()))?;
            let home = user.dir.to_string_lossy().into_owned();
            Ok(Account { uid: user.uid, gid: Some(user.gid), groups, name: Some(user.name), home: Some(home) })
        }
        (None, Some(uid)) => Ok(Account { uid, gid: None, groups: Vec::new(), name: None, home: None }),
        (None, None) => Err(format!("there is no user {text} on this system (create it, or name another user)")),
    }
}

/// Reads a group: a name, or a number.
///
/// # Errors
/// Returns a message for the operator if the group cannot be looked up.
pub(crate) fn parse_group(text: &str) -> Result<Gid, String> {
    if let Ok(number) = text.parse() {
        return Ok(Gid::from_raw(number));
    }
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(format!("there is no group {text} on this system (create it, or name another group)")),
        Err(errno) => Err(format!("cannot look up group {text}: {}", errno.desc().to_lowercase())),
    }
}

/// Reads a comma-separated list of groups, or `none`.
///
/// # Errors
/// Returns a message for the operator if a group cannot be looked up.
pub(crate) fn parse_groups(text: &str) -> Result<GroupList, String> {
    listed(text).map(parse_group).collect::<Result<_, _>>().map(GroupList)
}

/// Reads `USER:GROUP`; the default group is the user's.
///
/// # Errors
/// Returns a message for the operator if the user or the group cannot be looked up.
pub(crate) fn parse_owner(text: &str) -> Result<Owner, String> {
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let user = parse_user(user)?;
    let group = group.map_or_else(
        || user.gid.ok_or(format!("user {text} has no account, and therefore no group (expected USER:GROUP)")),
        parse_group,
    )?;
    Ok(Owner { user: user.uid, group })
}

/// Reads a comma-separated list of capabilities, or `none`.
///
/// # Errors
/// Returns a message for the operator if a capability is unknown.
pub(crate) fn parse_capabilities(text: &str) -> Result<CapabilitySet, String> {
    let one = |name: &str| -> Result<u64, String> {
        let canonical = caps::to_canonical(name);
        let capability: Capability = canonical.parse().map_err(|_| {
            format!("unknown capability {name} (expected names as in net_bind_service,sys_nice, or none)")
        })?;
        Ok(capability.bitmask())
    };
    listed(text).map(one).try_fold(0, |all, one| Ok(all | one?)).map(CapabilitySet)
}

fn listed(text: &str) -> impl Iterator<Item = &str> {
    let text = if text == "none" { "" } else { text };
    text.split(',').map(str::trim).filter(|word| !word.is_empty())
}

/// The resources, with the names that shells and systemd use.
const RESOURCES: [(&str, Resource); 15] = [
    ("as", Resource::RLIMIT_AS),
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

/// Formats the limit like `--rlimit`.
impl fmt::Display for ResourceLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: u64| match value {
            RLIM_INFINITY => "unlimited".to_owned(),
            value => format_size(value).replace([' ', 'i', 'B'], ""),
        };
        write!(f, "{}={}", self.name(), shown(self.soft))?;
        if self.hard == self.soft { Ok(()) } else { write!(f, ":{}", shown(self.hard)) }
    }
}

impl ResourceLimit {
    /// Whether a low value can prevent a process from starting.
    pub(crate) fn is_vital(&self) -> bool {
        use Resource as R;
        [R::RLIMIT_AS, R::RLIMIT_CPU, R::RLIMIT_DATA, R::RLIMIT_NOFILE, R::RLIMIT_NPROC, R::RLIMIT_STACK]
            .contains(&self.resource)
    }

    /// Returns the name that `--rlimit` uses for the resource.
    pub(crate) fn name(&self) -> &'static str {
        name_of(self.resource)
    }
}

/// Returns all resources that `--rlimit` accepts.
pub(crate) fn resources() -> impl Iterator<Item = Resource> {
    RESOURCES.iter().map(|(_, resource)| *resource)
}

/// Returns the name that `--rlimit` uses for a resource.
pub(crate) fn name_of(resource: Resource) -> &'static str {
    RESOURCES.iter().find(|(_, known)| *known == resource).map_or("", |(name, _)| name)
}

/// Reads `NAME=SOFT[:HARD]`.
///
/// # Errors
/// Returns a message for the operator if the text is not a valid limit.
pub(crate) fn parse_limit(text: &str) -> Result<ResourceLimit, String> {
    const FORM: &str = "expected NAME=SOFT or NAME=SOFT:HARD, as in nofile=4096 or core=0:unlimited";
    let (name, values) = text.split_once('=').ok_or(format!("'{text}' is not a limit ({FORM})"))?;
    let found = RESOURCES.iter().find(|(known, _)| name.eq_ignore_ascii_case(known));
    let Some(&(_, resource)) = found else {
        let names: Vec<&str> = RESOURCES.iter().map(|(name, _)| *name).collect();
        return Err(format!("unknown limit '{name}' (expected one of {})", names.join(", ")));
    };
    let value = |text: &str| match text {
        "unlimited" | "infinity" => Ok(RLIM_INFINITY),
        text => parse_size(text).map_err(|_| format!("'{text}' is not a number, a size or unlimited ({FORM})")),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (value(soft)?, value(hard)?);
    if soft > hard {
        return Err(format!("the soft limit in '{text}' is above the hard limit ({FORM})"));
    }
    Ok(ResourceLimit { resource, soft, hard })
}

/// Reads `spread`, or numbers and ranges of processors as in `0-3,8`.
///
/// # Errors
/// Returns a message for the operator if the text is not a valid list.
pub(crate) fn parse_affinity(text: &str) -> Result<Affinity, String> {
    if text == "spread" {
        return Ok(Affinity::Spread);
    }
    let wrong = || format!("'{text}' is not a list of processors (expected a list as in 0-3,8, or spread)");
    let mut processors = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) =
            (first.trim().parse().map_err(|_| wrong())?, last.trim().parse().map_err(|_| wrong())?);
        if first > last || last >= nix::sched::CpuSet::count() {
            return Err(wrong());
        }
        processors.extend(first..=last);
    }
    Ok(Affinity::Processors(processors))
}

/// Reads `NAME=VALUE`; `NAME` alone passes the master's variable on.
///
/// # Errors
/// Returns a message for the operator if the text is invalid, or the variable is not set.
pub(crate) fn parse_variable(text: &str) -> Result<Variable, String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.to_owned()),
        None => {
            let value = std::env::var(text);
            (
                text,
                value.map_err(|_| {
                    format!("the variable {text} is not set in this environment (give a value, as in {text}=VALUE)")
                })?,
            )
        }
    };
    if name.is_empty() || text.contains('\0') {
        return Err(format!("'{text}' is not a variable (expected NAME=VALUE)"));
    }
    Ok(Variable { name: name.to_owned(), value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        let root = parse_user("root").unwrap();
        assert_eq!(
            (root.uid, root.gid, root.home.as_deref()),
            (Uid::from_raw(0), Some(Gid::from_raw(0)), Some("/root"))
        );
        assert_eq!(parse_user("0").unwrap(), root);
        assert_eq!(parse_user("4000000").unwrap().gid, None);
        assert!(parse_user("no-such-user").unwrap_err().contains("there is no user no-such-user"));
        assert_eq!(parse_groups("root,7"), Ok(GroupList(vec![Gid::from_raw(0), Gid::from_raw(7)])));
        assert_eq!(parse_groups("none"), Ok(GroupList(Vec::new())));
        assert!(parse_groups("root,no-such-group").unwrap_err().contains("there is no group no-such-group"));
        assert_eq!(parse_owner("root:5"), Ok(Owner { user: Uid::from_raw(0), group: Gid::from_raw(5) }));
        assert!(parse_owner("4000000").unwrap_err().contains("expected USER:GROUP"));
    }

    #[test]
    fn limits_are_read() {
        let nofile = |soft, hard| Ok(ResourceLimit { resource: Resource::RLIMIT_NOFILE, soft, hard });
        assert_eq!(parse_limit("nofile=4K"), nofile(4096, 4096));
        assert_eq!(parse_limit("NOFILE=5:unlimited"), nofile(5, RLIM_INFINITY));
        for text in ["as=64M", "nofile=5:unlimited", "data=1000"] {
            assert_eq!(parse_limit(text).unwrap().to_string(), text);
        }
        for (text, said) in [
            ("nofile", "is not a limit"),
            ("files=3", "unknown limit 'files' (expected one of as, core"),
            ("core=", "is not a number"),
            ("core=9:8", "above the hard limit"),
        ] {
            let error = parse_limit(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn processors_capabilities_and_variables_are_read() {
        assert_eq!(parse_affinity("spread"), Ok(Affinity::Spread));
        assert_eq!(parse_affinity("0-2,8"), Ok(Affinity::Processors(vec![0, 1, 2, 8])));
        for text in ["", "3-1", "x", "-1", "99999999"] {
            assert!(parse_affinity(text).unwrap_err().contains("is not a list of processors"), "{text}");
        }
        assert_eq!(parse_capabilities("net_bind_service,CAP_KILL"), Ok(CapabilitySet(1 << 10 | 1 << 5)));
        assert_eq!(parse_capabilities("none"), Ok(CapabilitySet(0)));
        assert!(parse_capabilities("fly").unwrap_err().contains("unknown capability fly"));
        let variable = |name: &str, value: &str| Ok(Variable { name: name.to_owned(), value: value.to_owned() });
        assert_eq!(parse_variable("A=b=c"), variable("A", "b=c"));
        assert_eq!(parse_variable("A="), variable("A", ""));
        assert!(parse_variable("=x").unwrap_err().contains("is not a variable"));
        assert!(parse_variable("NO_SUCH_VARIABLE_HERE").unwrap_err().contains("is not set in this environment"));
    }
}
