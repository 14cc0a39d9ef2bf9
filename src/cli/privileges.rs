//! The flags for what the application's processes may do and see: identity, limits, surroundings, sandbox.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::config::parse_mode;
use crate::config::privileges::{
    Account, Affinity, CapabilitySet, GroupList, Owner, PrivilegesConfig, ResourceLimit, SandboxConfig, Variable,
    parse_affinity, parse_capabilities, parse_group, parse_groups, parse_limit, parse_owner, parse_user,
    parse_variable,
};
use nix::unistd::Gid;

/// The flags of everything that serves.
#[derive(Args, Debug)]
pub(super) struct PrivilegeOptions {
    /// Run the application as this user, a name or a number; with its groups, and without any capability
    #[arg(long, value_name = "USER", env = "FORKYARD_USER", value_parser = parse_user, help_heading = "Privileges")]
    user: Option<Account>,

    /// Run the application in this group [default: the user's own]
    #[arg(long, value_name = "GROUP", env = "FORKYARD_GROUP", value_parser = parse_group, help_heading = "Privileges")]
    group: Option<Gid>,

    /// Further groups, with commas between them, or none [default: the user's]
    #[arg(long, value_name = "GROUPS", env = "FORKYARD_SUPPLEMENTARY_GROUPS", value_parser = parse_groups, help_heading = "Privileges")]
    supplementary_groups: Option<GroupList>,

    /// Capabilities that the application keeps, as in net_bind_service,sys_nice, or none [default: none with --user, else
    /// all that there are]
    #[arg(long, value_name = "NAMES", env = "FORKYARD_CAPABILITIES", value_parser = parse_capabilities, help_heading = "Privileges")]
    capabilities: Option<CapabilitySet>,

    /// Have the kernel refuse the application, and all that it starts, any new privilege: no setuid program works [default:
    /// true with --user or --sandbox, else false]
    #[arg(
        long,
        value_name = "BOOL",
        env = "FORKYARD_NO_NEW_PRIVILEGES",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Privileges"
    )]
    no_new_privileges: Option<bool>,

    /// Confine the application to this folder as its root
    #[arg(long, value_name = "FOLDER", env = "FORKYARD_CHROOT", help_heading = "Privileges")]
    chroot: Option<PathBuf>,

    /// Start the application in this folder (with --chroot: as seen from there)
    #[arg(long, value_name = "FOLDER", env = "FORKYARD_CHDIR", help_heading = "Privileges")]
    chdir: Option<PathBuf>,

    /// What the files that the application makes are not to permit, in octal, as in 027
    #[arg(long, value_name = "MODE", env = "FORKYARD_UMASK", value_parser = parse_mode, help_heading = "Privileges")]
    umask: Option<u32>,

    /// A limit of setrlimit(2), as in nofile=4096, core=0:unlimited or as=2G; repeatable
    #[arg(long, value_name = "NAME=SOFT[:HARD]", env = "FORKYARD_RLIMIT", value_delimiter = ',', value_parser = parse_limit, help_heading = "Privileges")]
    rlimit: Vec<ResourceLimit>,

    /// Priority of the application's processes, from -20 (first) through 0 (normal) to 19 (last)
    #[arg(long, value_name = "N", env = "FORKYARD_NICE", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-20..=19), help_heading = "Privileges")]
    nice: Option<i32>,

    /// Processors that the application runs on, as in 0-3,8; spread gives each process one of its own, in turn
    #[arg(long, value_name = "LIST", env = "FORKYARD_CPU_AFFINITY", value_parser = parse_affinity, help_heading = "Privileges")]
    cpu_affinity: Option<Affinity>,

    /// A variable of the application's environment; repeatable. NAME alone passes on the one that is set here
    #[arg(long = "env", value_name = "NAME=VALUE", env = "FORKYARD_ENV", value_parser = parse_variable, help_heading = "Privileges")]
    variables: Vec<Variable>,

    /// Give the application no other variables than those of --env, the user's name and home, and Forkyard's own
    #[arg(long, env = "FORKYARD_CLEAR_ENV", help_heading = "Privileges")]
    clear_env: bool,

    /// Whose Unix socket files are [default: the user and group that the application runs as]
    #[arg(long, value_name = "USER:GROUP", env = "FORKYARD_SOCKET_OWNER", value_parser = parse_owner, help_heading = "Sockets")]
    socket_owner: Option<Owner>,

    /// Write the master's pid to this file; a second master with the same file does not start
    #[arg(long, value_name = "FILE", env = "FORKYARD_PID_FILE", help_heading = "Processes")]
    pid_file: Option<PathBuf>,
}

impl PrivilegeOptions {
    pub(super) fn config(self, sandbox: Option<SandboxConfig>) -> PrivilegesConfig {
        PrivilegesConfig {
            user: self.user,
            group: self.group,
            supplementary_groups: self.supplementary_groups,
            capabilities: self.capabilities,
            no_new_privileges: self.no_new_privileges,
            chroot: self.chroot,
            chdir: self.chdir,
            umask: self.umask,
            limits: self.rlimit,
            nice: self.nice,
            affinity: self.cpu_affinity,
            variables: self.variables,
            clear_env: self.clear_env,
            socket_owner: self.socket_owner,
            pid_file: self.pid_file,
            sandbox,
        }
    }
}

/// The sandbox of workers with the application linked into them.
#[derive(Args, Debug)]
pub(super) struct SandboxOptions {
    /// Let workers reach only what the system's libraries need, and what the two flags below name; and only the system calls
    /// of a web application
    #[arg(
        long,
        value_name = "MODE",
        env = "FORKYARD_SANDBOX",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "required",
        help_heading = "Privileges"
    )]
    sandbox: Option<SandboxMode>,

    /// A folder or file that sandboxed workers may read; repeatable
    #[arg(
        long,
        value_name = "PATH",
        env = "FORKYARD_SANDBOX_READ",
        value_delimiter = ',',
        help_heading = "Privileges"
    )]
    sandbox_read: Vec<PathBuf>,

    /// A folder or file that sandboxed workers may read, write, make and remove; repeatable
    #[arg(
        long,
        value_name = "PATH",
        env = "FORKYARD_SANDBOX_WRITE",
        value_delimiter = ',',
        help_heading = "Privileges"
    )]
    sandbox_write: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SandboxMode {
    /// A kernel that cannot do it is an error
    Required,
    /// As much of it as the kernel can do
    BestEffort,
}

impl SandboxOptions {
    /// # Errors
    /// A sentence for the operator: paths, but no sandbox.
    pub(super) fn config(self) -> Result<Option<SandboxConfig>, String> {
        let Self { sandbox, sandbox_read: read, sandbox_write: write } = self;
        if sandbox.is_none() && !(read.is_empty() && write.is_empty()) {
            return Err("--sandbox-read and --sandbox-write are for --sandbox, which is not given".to_owned());
        }
        Ok(sandbox.map(|mode| SandboxConfig { required: mode == SandboxMode::Required, read, write }))
    }
}
