//! Decides the order in which a process gives up privileges: turns the operator's settings into a list of [`Step`]s.
//! Pure.
//!
//! Each step removes a privilege that later steps do not need:
//!
//! ```text
//! limits, priority, processors   may need CAP_SYS_RESOURCE and CAP_SYS_NICE
//! root directory                 needs CAP_SYS_CHROOT; accounts must be looked up before
//! bounding set                   needs CAP_SETPCAP
//! groups, group, user            in this order: a process that is no longer root cannot change its groups
//! capabilities                   the capabilities to keep survive the change of user until this step
//! no_new_privs                   from here on no privilege can be regained, not even by a setuid program
//! directory                      as the new user, which must be able to enter it
//! sandbox                        Landlock, which opens files, then seccomp (in `sandbox.rs`)
//! ```
//!
//! This module makes no system call: the caller passes the state of this process as [`Standing`].

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use caps::Capability;
use nix::sched::CpuSet;
use nix::sys::resource::{RLIM_INFINITY, Resource};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};

use crate::config::privileges::{Affinity, CapabilitySet, PrivilegesConfig, ResourceLimit, name_of};

/// The identity and the privileges of this process.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    pub(crate) user: Uid,
    pub(crate) group: Gid,
    /// Effective capabilities, one bit each.
    pub(crate) capabilities: u64,
    /// Whether the process is in the initial user namespace. Capabilities in other namespaces do not override
    /// system-wide limits.
    pub(crate) in_first_namespace: bool,
    /// The processors that the process may run on, in order.
    pub(crate) processors: Vec<usize>,
    pub(crate) nice: i32,
    /// The hard limit of each resource.
    pub(crate) hard_limits: Vec<(Resource, u64)>,
    /// The maximum number of descriptors that any process may have.
    pub(crate) most_descriptors: u64,
}

/// One change to a process. Carrying it out allocates no memory and takes no lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Limit {
        resource: Resource,
        soft: u64,
        hard: u64,
    },
    Nice(i32),
    Affinity(CpuSet),
    Umask(Mode),
    Chroot(CString),
    /// Removes all but these capabilities from the bounding set.
    Bound(CapabilitySet),
    /// Makes the capabilities survive the change of user.
    CarryCapabilities,
    Groups(Vec<Gid>),
    Group(Gid),
    User(Uid),
    /// Keeps only these capabilities. If `ambient`, the next program that is executed keeps them too.
    Capabilities {
        kept: CapabilitySet,
        ambient: bool,
    },
    NoNewPrivileges,
    Chdir(CString),
}

impl Step {
    /// Returns the flag that requested the step.
    pub(crate) fn flag(&self) -> &'static str {
        match self {
            Self::Limit { .. } => "--rlimit",
            Self::Nice(_) => "--nice",
            Self::Affinity(_) => "--cpu-affinity",
            Self::Umask(_) => "--umask",
            Self::Chroot(_) => "--chroot",
            Self::Bound(_) | Self::CarryCapabilities | Self::Capabilities { .. } => "--capabilities",
            Self::Groups(_) => "--supplementary-groups",
            Self::Group(_) => "--group",
            Self::User(_) => "--user",
            Self::NoNewPrivileges => "--no-new-privileges",
            Self::Chdir(_) => "--chdir",
        }
    }

    /// Returns the text added to the flag in the message if the step fails.
    pub(crate) fn detail(&self) -> &'static str {
        match self {
            Self::Limit { resource, .. } => name_of(*resource),
            _ => "",
        }
    }
}

/// Returns all steps for a process, in order. The step that binds the process to processors is not included, because it
/// depends on the slot ([`affinity`]).
///
/// `executes` is true if the process will execute a program.
///
/// # Errors
/// Returns a message for the operator for every step that is not possible, with the reason and the flag.
pub(crate) fn steps(config: &PrivilegesConfig, standing: &Standing, executes: bool) -> Result<Vec<Step>, Vec<String>> {
    let limits = config.limits.iter().map(|limit| {
        let step = Step::Limit { resource: limit.resource, soft: limit.soft, hard: limit.hard };
        check_limit(limit, standing).map(|()| vec![step])
    });
    let nice = config.nice.iter().map(|&nice| check_nice(nice, standing).map(|()| vec![Step::Nice(nice)]));
    let umask = config.umask.map(|mode| Ok(vec![Step::Umask(Mode::from_bits_truncate(mode))]));
    let chroot = config.chroot.iter().map(|directory| {
        standing.need(Capability::CAP_SYS_CHROOT, "--chroot", "change its root directory")?;
        Ok(vec![Step::Chroot(text(directory, "--chroot")?)])
    });
    let no_new_privileges =
        no_new_privileges(config).map(|wanted| Vec::from_iter(wanted.then_some(Step::NoNewPrivileges)));
    let chdir = config.chdir.iter().map(|directory| Ok(vec![Step::Chdir(text(directory, "--chdir")?)]));
    let sandbox = check_sandbox(config, standing).map(|()| Vec::new());
    let parts = limits.chain(nice).chain(umask).chain(chroot).chain([identity_steps(config, standing, executes)]);
    let (mut steps, mut causes) = (Vec::new(), Vec::new());
    for part in parts.chain([no_new_privileges]).chain(chdir).chain([sandbox]) {
        part.map_or_else(|cause| causes.push(cause), |part| steps.extend(part));
    }
    if causes.is_empty() { Ok(steps) } else { Err(causes) }
}

/// Returns the steps that change the user and groups of a process, and take away its capabilities.
fn identity_steps(config: &PrivilegesConfig, standing: &Standing, executes: bool) -> Result<Vec<Step>, String> {
    let identity = identity(config, standing)?;
    if identity.groups.is_some() || identity.group.is_some() {
        let flag = if config.user.is_some() { "--user" } else { "--group" };
        standing.need(Capability::CAP_SETGID, flag, "change its groups")?;
    }
    if identity.user.is_some() {
        standing.need(Capability::CAP_SETUID, "--user", "become another user")?;
        standing.need(Capability::CAP_KILL, "--user", "signal processes of another user to stop them")?;
    }
    let mut steps = Vec::new();
    let kept = config.capabilities.or(config.user.as_ref().map(|_| CapabilitySet(0)));
    if let Some(CapabilitySet(kept)) = kept
        && let missing @ 1.. = kept & !standing.capabilities
    {
        let names = names(missing);
        return Err(format!("--capabilities: this process lacks {names} (start it as root, or omit them)"));
    }
    if let Some(kept) = kept {
        if standing.has(Capability::CAP_SETPCAP) {
            steps.push(Step::Bound(kept));
        }
        if kept.0 != 0 && identity.user.is_some() {
            steps.push(Step::CarryCapabilities);
        }
    }
    steps.extend(identity.groups.map(Step::Groups));
    steps.extend(identity.group.map(Step::Group));
    steps.extend(identity.user.map(Step::User));
    steps.extend(kept.map(|kept| Step::Capabilities { kept, ambient: executes }));
    Ok(steps)
}

/// Checks that this process may set the limit (setrlimit(2)).
fn check_limit(limit: &ResourceLimit, standing: &Standing) -> Result<(), String> {
    let (name, hard) = (limit.name(), limit.hard);
    if limit.resource == Resource::RLIMIT_NOFILE && hard > standing.most_descriptors {
        let most = standing.most_descriptors;
        return Err(format!(
            "--rlimit {name}={}: the maximum of this system is {most} (choose that value, or raise it with: sysctl fs.nr_open)",
            shown(hard)
        ));
    }
    let allowed = standing.hard_limits.iter().find(|(resource, _)| *resource == limit.resource);
    match allowed {
        Some(&(_, allowed)) if hard > allowed && !standing.may_exceed(Capability::CAP_SYS_RESOURCE) => Err(format!(
            "--rlimit {name}={}: the highest value that this process can set is {} (choose that value, raise its own hard limit \
             with ulimit -H or the unit's Limit{}=, or start it as root)",
            shown(hard),
            shown(allowed),
            name.to_ascii_uppercase()
        )),
        Some(_) | None => Ok(()),
    }
}

/// Checks that this process may set the priority (setpriority(2)).
fn check_nice(nice: i32, standing: &Standing) -> Result<(), String> {
    // RLIMIT_NICE counts in the opposite direction, from 1 to 40.
    let limit = standing.hard_limits.iter().find(|(resource, _)| *resource == Resource::RLIMIT_NICE);
    let allowed = limit.map_or(0, |&(_, limit)| i32::try_from(limit.min(40)).unwrap_or(40));
    let least = standing.nice.min(20 - allowed);
    if nice >= least || standing.may_exceed(Capability::CAP_SYS_NICE) {
        return Ok(());
    }
    Err(format!(
        "--nice {nice}: the lowest value that this process can set is {least} (choose that value, raise its limit with ulimit -e or the \
         unit's LimitNICE=, or start it as root)"
    ))
}

impl Standing {
    pub(crate) fn has(&self, capability: Capability) -> bool {
        self.capabilities & capability.bitmask() != 0
    }

    fn need(&self, capability: Capability, flag: &str, what: &str) -> Result<(), String> {
        if self.has(capability) {
            return Ok(());
        }
        Err(format!("{flag}: this process cannot {what}: it lacks {capability} (start it as root, or omit {flag})"))
    }

    /// Whether this process may exceed a system-wide limit because of `capability`.
    fn may_exceed(&self, capability: Capability) -> bool {
        self.in_first_namespace && self.has(capability)
    }
}

fn shown(limit: u64) -> String {
    if limit == RLIM_INFINITY { "unlimited".to_owned() } else { limit.to_string() }
}

/// The parts of the identity that change.
struct Identity {
    groups: Option<Vec<Gid>>,
    group: Option<Gid>,
    user: Option<Uid>,
}

fn identity(config: &PrivilegesConfig, standing: &Standing) -> Result<Identity, String> {
    let group = config.group.or(config.user.as_ref().and_then(|user| user.gid));
    if let (Some(user), None) = (&config.user, group) {
        return Err(format!(
            "--user: user {} has no account and therefore no group (name a group with --group)",
            user.uid
        ));
    }
    let groups = config.supplementary_groups.as_ref().map(|groups| groups.0.clone());
    let of_user = || config.user.as_ref().map(|user| user.groups.clone());
    // With a group alone, the master's supplementary groups are not passed to the application.
    let groups = groups.or_else(of_user).or_else(|| group.map(|_| Vec::new()));
    let user = config.user.as_ref().map(|user| user.uid).filter(|&user| user != standing.user);
    let group = group.filter(|&group| group != standing.group);
    // If the process already runs as the configured user and cannot change its groups, it keeps the groups that the
    // program that started it has set.
    let given = user.is_none() && group.is_none() && config.supplementary_groups.is_none();
    let groups = groups.filter(|_| !given || standing.has(Capability::CAP_SETGID));
    Ok(Identity { groups, group, user })
}

fn no_new_privileges(config: &PrivilegesConfig) -> Result<bool, String> {
    match config.no_new_privileges {
        Some(false) if config.sandbox.is_some() => {
            Err("--no-new-privileges=false: a sandbox requires no_new_privs (omit this flag, or --sandbox)".to_owned())
        }
        Some(asked) => Ok(asked),
        None => Ok(config.user.is_some() || config.sandbox.is_some()),
    }
}

fn check_sandbox(config: &PrivilegesConfig, standing: &Standing) -> Result<(), String> {
    let root = config.user.as_ref().map_or(standing.user, |user| user.uid).is_root();
    if config.sandbox.is_some() && root {
        return Err(
            "--sandbox: the workers would run as root, and a sandbox does not prevent changes of the mode or owner of root's \
                    files (choose another user with --user)"
                .to_owned(),
        );
    }
    Ok(())
}

/// Returns the step that binds the process in `slot` to processors, or `None` if none are configured.
///
/// # Errors
/// Returns a message for the operator if a processor is not available.
pub(crate) fn affinity(config: &PrivilegesConfig, standing: &Standing, slot: u32) -> Result<Option<Step>, String> {
    let available = &standing.processors;
    let chosen = match &config.affinity {
        None => return Ok(None),
        Some(Affinity::Spread) => {
            let index = usize::try_from(slot).unwrap_or(0).checked_rem(available.len());
            index.and_then(|index| available.get(index)).copied().into_iter().collect()
        }
        Some(Affinity::Processors(list)) => list.clone(),
    };
    if let Some(missing) = chosen.iter().find(|processor| !available.contains(processor)) {
        return Err(format!(
            "--cpu-affinity: processor {missing} is not available to this process (available: {available:?})"
        ));
    }
    let mut set = CpuSet::new();
    for processor in chosen {
        set.set(processor).map_err(|errno| format!("--cpu-affinity: processor {processor}: {}", errno.desc()))?;
    }
    Ok(Some(Step::Affinity(set)))
}

fn text(path: &Path, flag: &str) -> Result<CString, String> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| format!("{flag}: a path cannot contain a null byte"))
}

/// Returns the names of capabilities.
fn names(set: u64) -> String {
    let mut names: Vec<String> =
        caps::all().iter().filter(|one| one.bitmask() & set != 0).map(ToString::to_string).collect();
    names.sort();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::privileges::{Account, GroupList, ResourceLimit, SandboxConfig};

    const ALL: u64 = (1 << 41) - 1;

    fn root() -> Standing {
        Standing {
            user: Uid::from_raw(0),
            group: Gid::from_raw(0),
            capabilities: ALL,
            in_first_namespace: true,
            processors: vec![0, 2, 5],
            nice: 0,
            hard_limits: vec![(Resource::RLIMIT_NOFILE, 4096), (Resource::RLIMIT_NICE, 0)],
            most_descriptors: 1 << 20,
        }
    }

    fn unprivileged() -> Standing {
        Standing { user: Uid::from_raw(99), group: Gid::from_raw(99), capabilities: 0, ..root() }
    }

    fn account(number: u32) -> Account {
        let (uid, gid) = (Uid::from_raw(number), Some(Gid::from_raw(number)));
        Account { uid, gid, groups: vec![Gid::from_raw(number), Gid::from_raw(7)], name: None, home: None }
    }

    fn random(random: &mut fastrand::Rng) -> PrivilegesConfig {
        let limit = ResourceLimit { resource: Resource::RLIMIT_CORE, soft: 0, hard: 0 };
        PrivilegesConfig {
            user: random.bool().then(|| account(random.u32(1..3))),
            group: random.bool().then(|| Gid::from_raw(random.u32(0..3))),
            supplementary_groups: random.bool().then(|| GroupList(vec![Gid::from_raw(5)])),
            capabilities: random.bool().then(|| CapabilitySet(random.u64(..) & ALL)),
            no_new_privileges: random.bool().then(|| random.bool()),
            chroot: random.bool().then(|| "/srv".into()),
            chdir: random.bool().then(|| "/".into()),
            umask: random.bool().then_some(0o27),
            limits: if random.bool() { vec![limit] } else { Vec::new() },
            nice: random.bool().then(|| random.i32(-20..20)),
            sandbox: random.bool().then(|| SandboxConfig { required: true, read: Vec::new(), write: Vec::new() }),
            ..PrivilegesConfig::default()
        }
    }

    #[test]
    fn no_step_needs_a_privilege_that_an_earlier_step_removed() {
        let rank = |step: &Step| match step {
            Step::Limit { .. } | Step::Nice(_) | Step::Affinity(_) | Step::Umask(_) => 0,
            Step::Chroot(_) => 1,
            Step::Bound(_) => 2,
            Step::CarryCapabilities => 3,
            Step::Groups(_) => 4,
            Step::Group(_) => 5,
            Step::User(_) => 6,
            Step::Capabilities { .. } => 7,
            Step::NoNewPrivileges => 8,
            Step::Chdir(_) => 9,
        };
        let seed = fastrand::u64(..);
        let mut source = fastrand::Rng::with_seed(seed);
        let mut planned = 0;
        for _ in 0..2000 {
            let config = random(&mut source);
            let standing = if source.bool() { root() } else { unprivileged() };
            let Ok(steps) = steps(&config, &standing, source.bool()) else { continue };
            planned += 1;
            assert!(steps.is_sorted_by_key(rank), "seed {seed}: {steps:?}");
            let has = |wanted: u8| steps.iter().any(|step| rank(step) == wanted);
            assert!(
                !has(6) || (has(4) && has(7)),
                "seed {seed}: a different user with the master's groups or capabilities: {steps:?}"
            );
            assert!(config.sandbox.is_none() || has(8), "seed {seed}: {steps:?}");
        }
        assert!(planned > 300, "seed {seed}: {planned}");
    }

    #[test]
    fn a_different_user_has_its_own_groups_and_no_capabilities() {
        let config = PrivilegesConfig { user: Some(account(33)), ..PrivilegesConfig::default() };
        let (gid, none) = (Gid::from_raw(33), CapabilitySet(0));
        let expected = [
            Step::Bound(none),
            Step::Groups(vec![gid, Gid::from_raw(7)]),
            Step::Group(gid),
            Step::User(Uid::from_raw(33)),
            Step::Capabilities { kept: none, ambient: false },
            Step::NoNewPrivileges,
        ];
        assert_eq!(steps(&config, &root(), false).unwrap(), expected);
        // A process that was started as the configured user has nothing to change, and needs no privileges.
        let same = Standing { user: Uid::from_raw(33), group: gid, ..unprivileged() };
        assert_eq!(steps(&config, &same, false).unwrap(), expected[4..]);
        assert_eq!(steps(&PrivilegesConfig::default(), &root(), true), Ok(Vec::new()));
    }

    #[test]
    fn an_impossible_step_is_reported_with_its_flag() {
        let none = PrivilegesConfig::default;
        let sandbox = || Some(SandboxConfig { required: true, read: Vec::new(), write: Vec::new() });
        for (config, standing, said) in [
            (
                PrivilegesConfig { user: Some(account(1)), ..none() },
                unprivileged(),
                "--user: this process cannot change",
            ),
            (
                PrivilegesConfig { group: Some(Gid::from_raw(1)), ..none() },
                unprivileged(),
                "--group: this process cannot",
            ),
            (PrivilegesConfig { chroot: Some("/srv".into()), ..none() }, unprivileged(), "it lacks CAP_SYS_CHROOT"),
            (
                PrivilegesConfig { capabilities: Some(CapabilitySet(1)), ..none() },
                unprivileged(),
                "this process lacks CAP_CHOWN",
            ),
            (
                PrivilegesConfig { user: Some(Account { gid: None, ..account(1) }), ..none() },
                root(),
                "name a group with --group",
            ),
            (PrivilegesConfig { sandbox: sandbox(), ..none() }, root(), "choose another user with --user"),
            (
                PrivilegesConfig { sandbox: sandbox(), no_new_privileges: Some(false), ..none() },
                unprivileged(),
                "--no-new-privileges=false",
            ),
        ] {
            let errors = steps(&config, &standing, false).unwrap_err();
            assert!(errors.iter().any(|error| error.contains(said)), "{errors:?}");
        }
    }

    #[test]
    fn limits_that_cannot_be_set_are_reported_with_the_possible_value() {
        let nofile = |hard| ResourceLimit { resource: Resource::RLIMIT_NOFILE, soft: 1, hard };
        let limits = |hard| PrivilegesConfig { limits: vec![nofile(hard)], ..PrivilegesConfig::default() };
        let nice = |nice| PrivilegesConfig { nice: Some(nice), ..PrivilegesConfig::default() };
        let rootless = Standing { in_first_namespace: false, ..root() };
        let favoured = Standing { hard_limits: vec![(Resource::RLIMIT_NICE, 25)], ..unprivileged() };
        let yielding = Standing { nice: 10, ..unprivileged() };
        for (config, standing, said) in [
            (limits(4096), unprivileged(), None),
            (
                limits(4097),
                unprivileged(),
                Some("--rlimit nofile=4097: the highest value that this process can set is 4096"),
            ),
            (limits(4097), rootless.clone(), Some("LimitNOFILE=")),
            (limits(4097), root(), None),
            (limits(RLIM_INFINITY), root(), Some("--rlimit nofile=unlimited: the maximum of this system is 1048576")),
            (nice(0), unprivileged(), None),
            (nice(19), unprivileged(), None),
            (nice(-1), unprivileged(), Some("--nice -1: the lowest value that this process can set is 0")),
            (nice(-5), rootless, Some("LimitNICE=")),
            (nice(-5), root(), None),
            (nice(-5), favoured.clone(), None),
            (nice(-6), favoured, Some("can set is -5")),
            (nice(10), yielding.clone(), None),
            (nice(9), yielding, Some("can set is 10")),
        ] {
            let found = steps(&config, &standing, false);
            match said {
                None => assert!(found.is_ok(), "{found:?}"),
                Some(said) => {
                    assert!(found.clone().is_err_and(|errors| errors.concat().contains(said)), "{said}: {found:?}")
                }
            }
        }
    }

    #[test]
    fn slots_are_spread_over_the_available_processors() {
        let spread = PrivilegesConfig { affinity: Some(Affinity::Spread), ..PrivilegesConfig::default() };
        for (slot, processor) in [(0, 0), (1, 2), (2, 5), (3, 0)] {
            let mut set = CpuSet::new();
            set.set(processor).unwrap();
            assert_eq!(affinity(&spread, &root(), slot), Ok(Some(Step::Affinity(set))));
        }
        let list = PrivilegesConfig { affinity: Some(Affinity::Processors(vec![2, 3])), ..PrivilegesConfig::default() };
        let error = affinity(&list, &root(), 0).unwrap_err();
        assert!(error.contains("--cpu-affinity: processor 3 is not available"), "{error}");
        assert_eq!(affinity(&PrivilegesConfig::default(), &root(), 0), Ok(None));
    }
}
