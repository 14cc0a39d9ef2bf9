//! The flags for the privileges of the application's processes: identity, limits, environment, sandbox.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::config::parse_mode;
use crate::config::privileges::{
    Account, Affinity, CapabilitySet, GroupList, Owner, PrivilegesConfig, ResourceLimit, SandboxConfig, Variable,
    parse_affinity, parse_capabilities, parse_group, parse_groups, parse_limit, parse_owner, parse_user,
    parse_variable,
};
use nix::unistd::Gid;

/// Flags of both commands that serve.
#[derive(Args, Debug)]
pub(super) struct PrivilegeOptions {
    /// Run the application as this user (name or number), with its groups and without capabilities
    #[arg(long, value_name = "USER", env = "FORKYARD_USER", value_parser = parse_user, help_heading = "Privileges")]
    user: Option<Account>,

    /// Run the application with this group (name or number) [default: the user's group]
    #[arg(long, value_name = "GROUP", env = "FORKYARD_GROUP", value_parser = parse_group, help_heading = "Privileges")]
    group: Option<Gid>,

    /// Supplementary groups of the application, separated by commas, or none
    ///
    /// [default: the groups of --user; none with --group alone]
    #[arg(long, value_name = "GROUPS", env = "FORKYARD_SUPPLEMENTARY_GROUPS", value_parser = parse_groups, help_heading = "Privileges")]
    supplementary_groups: Option<GroupList>,

    /// Capabilities that the application keeps, as in net_bind_service,sys_nice, or none
    ///
    /// [default: none with --user, otherwise all that the master has]
    #[arg(long, value_name = "NAMES", env = "FORKYARD_CAPABILITIES", value_parser = parse_capabilities, help_heading = "Privileges")]
    capabilities: Option<CapabilitySet>,

    /// Prevent the application from gaining privileges from setuid programs and file capabilities
    ///
    /// This sets PR_SET_NO_NEW_PRIVS (prctl(2)). [default: true with --user or --sandbox, otherwise false]
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

    /// Root directory of the application
    #[arg(long, value_name = "DIR", env = "FORKYARD_CHROOT", help_heading = "Privileges")]
    chroot: Option<PathBuf>,

    /// Working directory of the application; with --chroot, as seen from the new root
    #[arg(long, value_name = "DIR", env = "FORKYARD_CHDIR", help_heading = "Privileges")]
    chdir: Option<PathBuf>,

    /// Permissions to remove from files that the application creates, in octal, as in 027
    #[arg(long, value_name = "MODE", env = "FORKYARD_UMASK", value_parser = parse_mode, help_heading = "Privileges")]
    umask: Option<u32>,

    /// Resource limit of the application (setrlimit(2)), as in nofile=4096; repeatable
    ///
    /// SOFT and HARD are numbers, sizes or unlimited, as in as=2G or core=0:unlimited.
    #[arg(long, value_name = "NAME=SOFT[:HARD]", env = "FORKYARD_RLIMIT", value_delimiter = ',', value_parser = parse_limit, help_heading = "Privileges")]
    rlimit: Vec<ResourceLimit>,

    /// Scheduling priority of the application, from -20 (highest) through 0 (normal) to 19 (lowest)
    #[arg(long, value_name = "N", env = "FORKYARD_NICE", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-20..=19), help_heading = "Privileges")]
    nice: Option<i32>,

    /// Processors that the application runs on, as in 0-3,8; spread assigns one to each process, in turn
    #[arg(long, value_name = "LIST", env = "FORKYARD_CPU_AFFINITY", value_parser = parse_affinity, help_heading = "Privileges")]
    cpu_affinity: Option<Affinity>,

    /// Environment variable of the application; repeatable
    ///
    /// NAME alone passes on the master's variable.
    #[arg(long = "env", value_name = "NAME=VALUE", env = "FORKYARD_ENV", value_parser = parse_variable, help_heading = "Privileges")]
    variables: Vec<Variable>,

    /// Do not pass the master's environment to the application
    ///
    /// The application gets only the variables of --env, those of its user (USER, LOGNAME, HOME), and Forkyard's own.
    #[arg(long, env = "FORKYARD_CLEAR_ENV", help_heading = "Privileges")]
    clear_env: bool,

    /// Owner of Unix socket files [default: the user and group of the application]
    #[arg(long, value_name = "USER:GROUP", env = "FORKYARD_SOCKET_OWNER", value_parser = parse_owner, help_heading = "Sockets")]
    socket_owner: Option<Owner>,

    /// Write the master's pid to this file; a second master with the same file does not start
    #[arg(long, value_name = "FILE", env = "FORKYARD_PID_FILE", help_heading = "Processes")]
    pid_file: Option<PathBuf>,
}

impl PrivilegeOptions {
    /// Returns the value of `--env NAME=…`. The last one takes effect.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.variables.iter().rev().find(|variable| variable.name == name).map(|variable| variable.value.as_str())
    }

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

/// Flags of linked applications.
#[derive(Args, Debug)]
pub(super) struct SandboxOptions {
    /// Restrict workers to the files and system calls that a web application needs
    ///
    /// The files are those that the system's libraries need, and those of --sandbox-read and --sandbox-write.
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

    /// File or directory that sandboxed workers may read; repeatable
    #[arg(
        long,
        value_name = "PATH",
        env = "FORKYARD_SANDBOX_READ",
        value_delimiter = ',',
        help_heading = "Privileges"
    )]
    sandbox_read: Vec<PathBuf>,

    /// File or directory that sandboxed workers may read, write, create and remove; repeatable
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
    /// Fail if the kernel does not support the whole sandbox
    Required,
    /// Apply as much of it as the kernel supports
    BestEffort,
}

impl SandboxOptions {
    /// # Errors
    /// Returns a message for the operator if paths are given without a sandbox.
    pub(super) fn config(self) -> Result<Option<SandboxConfig>, String> {
        let Self { sandbox, sandbox_read: read, sandbox_write: write } = self;
        if sandbox.is_none() && !(read.is_empty() && write.is_empty()) {
            return Err("--sandbox-read and --sandbox-write need --sandbox".to_owned());
        }
        Ok(sandbox.map(|mode| SandboxConfig { required: mode == SandboxMode::Required, read, write }))
    }
}
