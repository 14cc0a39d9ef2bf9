//! Measures the CPU time of processes and their descendants, with CPU-time clocks and /proc.
//!
//! /proc reports times in clock ticks, usually of 10 ms, and rounds each time down. If 64 processes share half a second of CPU
//! time, /proc may report zero for each of them. Living processes are therefore measured by their CPU-time clocks, in
//! nanoseconds, and only dead processes in ticks.
//!
//! The time of a dead child is included in its parent's sum for reaped children, so workers may start and exit during a run.
//! Descendants that have left the tree by a double fork are not counted.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{UsageWho, getrusage};
use nix::time::ClockId;
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::error::Error;

/// Minimum CPU time that is significant. If a run uses less, the processes' own timers may account for a large part of it.
pub(crate) const MEASURABLE: Duration = Duration::from_millis(10);

/// The figures of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    parent: i32,
    /// CPU time of the process's reaped children, in clock ticks.
    dead: u64,
}

/// Returns the CPU time that the processes of the trees below `roots` have used since they started.
pub(crate) fn of_trees(roots: &[i32]) -> Result<Duration, Error> {
    let members = trees(roots)?;
    let failed = Error::system("sysconf");
    let per_second = sysconf(SysconfVar::CLK_TCK).map_err(&failed)?.and_then(|ticks| u32::try_from(ticks).ok());
    let per_second = per_second.filter(|&ticks| ticks > 0).ok_or_else(|| failed(Errno::EINVAL))?;
    let dead: u64 = members.iter().map(|(_, stat)| stat.dead).sum();
    let living: Duration = members.iter().filter_map(|(pid, _)| clock(*pid)).sum();
    Ok(living + Duration::from_secs(dead) / per_second)
}

/// Returns the pids of the processes of these trees.
pub(crate) fn pids_of_trees(roots: &[i32]) -> Result<Vec<i32>, Error> {
    Ok(trees(roots)?.into_iter().map(|(pid, _)| pid).collect())
}

fn trees(roots: &[i32]) -> Result<Vec<(i32, Stat)>, Error> {
    let processes = processes();
    if let Some(&missing) = roots.iter().find(|root| !processes.contains_key(root)) {
        return Err(Error::NoProcess(missing));
    }
    Ok(members(&processes, roots))
}

/// Returns the CPU time of all threads of a process together, or `None` if the process has just died.
fn clock(pid: i32) -> Option<Duration> {
    ClockId::pid_cpu_clock_id(Pid::from_raw(pid)).and_then(ClockId::now).ok().map(Duration::from)
}

/// Returns the CPU time that this process has used.
pub(crate) fn own() -> Result<Duration, Error> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).map_err(Error::system("getrusage"))?;
    let micros = [usage.user_time(), usage.system_time()]
        .map(|time| u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap_or_default());
    Ok(Duration::from_micros(micros.iter().sum()))
}

fn processes() -> HashMap<i32, Stat> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return HashMap::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: i32| Some((pid, parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?)))
        .collect()
}

/// Parses /proc/PID/stat. Its second field, the command in parentheses, can contain any character.
fn parse(line: &str) -> Option<Stat> {
    let (_, behind_command) = line.rsplit_once(')')?;
    let fields: Vec<&str> = behind_command.split_ascii_whitespace().collect();
    // Fields 4 (ppid), 16 and 17 (cutime, cstime) of proc_pid_stat(5); the first field here is field 3.
    let times = fields.get(13..15)?.iter().map(|field| field.parse::<u64>().ok());
    Some(Stat { parent: fields.get(1)?.parse().ok()?, dead: times.sum::<Option<u64>>()? })
}

fn members(processes: &HashMap<i32, Stat>, roots: &[i32]) -> Vec<(i32, Stat)> {
    let below_a_root = |mut pid: i32| {
        // The chain of parents is as long as the tree is deep. The bound stops the loop if the tree changed while it was read.
        for _ in 0..processes.len() {
            if roots.contains(&pid) {
                return true;
            }
            match processes.get(&pid) {
                Some(stat) => pid = stat.parent,
                None => return false,
            }
        }
        false
    };
    processes.iter().filter(|(pid, _)| below_a_root(**pid)).map(|(pid, stat)| (*pid, *stat)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_parentheses_and_spaces() {
        let line = "77 (a) S 1 (b) R 12 77 77 0 -1 4194560 1 2 3 4 100 20 3 1 20 0 1 0 555 1000 10";
        assert_eq!(parse(line), Some(Stat { parent: 12, dead: 4 }));
        assert_eq!(parse("77 (short) R 12 77"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_tree_counts_each_member_once() {
        let stat = |parent, dead| Stat { parent, dead };
        let processes =
            HashMap::from([(1, stat(0, 1)), (10, stat(1, 2)), (11, stat(10, 4)), (12, stat(11, 8)), (20, stat(1, 16))]);
        let sum = |roots: &[i32]| members(&processes, roots).iter().map(|(_, stat)| stat.dead).sum::<u64>();
        assert_eq!(sum(&[10]), 14);
        assert_eq!(sum(&[10, 11]), 14);
        assert_eq!(sum(&[12, 20]), 24);
        assert_eq!(sum(&[1]), 31);
        assert_eq!(sum(&[]), 0);
    }

    #[test]
    fn a_cyclic_chain_ends() {
        let processes = HashMap::from([(5, Stat { parent: 6, dead: 1 }), (6, Stat { parent: 5, dead: 1 })]);
        assert!(members(&processes, &[1]).is_empty());
    }

    #[test]
    fn this_process_has_used_time() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let before = of_trees(&[pid]).unwrap();
        let start = own().unwrap();
        while own().unwrap() - start < Duration::from_millis(2) {}
        assert!(of_trees(&[pid]).unwrap() - before >= Duration::from_millis(2), "the clock resolves less than a tick");
        assert!(matches!(of_trees(&[i32::MAX]), Err(Error::NoProcess(i32::MAX))));
    }
}
