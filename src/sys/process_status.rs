//! Reads fields of `/proc/PID/status` (proc_pid_status(5)).

use nix::unistd::Pid;

/// Returns the value of the field `name` (given with its colon), or `None` if there is no such process or field.
pub(crate) fn process_status(pid: Pid, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_owned())
}

/// Returns the value of a field that contains an amount of memory, in KiB.
pub(crate) fn process_kib(pid: Pid, name: &str) -> Option<u64> {
    process_status(pid, name)?.strip_suffix("kB")?.trim().parse().ok()
}
