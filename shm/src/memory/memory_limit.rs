//! Determines how much memory is available on the machine and within the limits of this process's control groups (for a container or a
//! systemd unit). The kernel does not refuse memory beyond such a limit, but kills a process.
//!
//! This file determines which values are read from which files. Files are read through a function, so that tests can replace them.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A memory limit, and its unused part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) limit: u64,
    /// The unused part in bytes. Memory that the kernel can reclaim immediately (the kernel's page cache) counts as free.
    pub(crate) free: u64,
}

/// Returns the memory that this process and all its children may use, in bytes. This is the memory of the machine or the lowest limit of
/// this process's control groups, whichever is lower. Returns `None` if neither is known.
#[must_use]
pub fn memory_limit() -> Option<u64> {
    let machine =
        value_in(&read_file(Path::new("/proc/meminfo")).unwrap_or_default(), "MemTotal:").map(|kib| kib * 1024);
    let groups = limits(&read_file).into_iter().map(|left| left.limit);
    groups.chain(machine).min()
}

/// Returns the limit of the control group that has the least memory left.
pub(crate) fn tightest() -> Option<Left> {
    limits(&read_file).into_iter().min_by_key(|left| left.free)
}

/// Returns the kernel's estimate of the memory available without swapping, in bytes, or `None` if `/proc` is missing.
pub(crate) fn available_in_machine() -> Option<u64> {
    value_in(&read_file(Path::new("/proc/meminfo"))?, "MemAvailable:")?.checked_mul(1024)
}

fn read_file(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(1 << 20).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Returns the number that follows a name at the beginning of a line.
fn value_in(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_ascii_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()?.parse().ok())?)
}

/// The names of files and fields, which differ between cgroup v1 and v2.
struct Version {
    limit: &'static str,
    used: &'static str,
    /// Fields in `memory.stat` that give the size of the kernel's page cache for the group and its descendants.
    reclaimable: [&'static str; 2],
}

const V1: Version = Version {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file", "total_active_file"],
};
const V2: Version =
    Version { limit: "memory.max", used: "memory.current", reclaimable: ["inactive_file", "active_file"] };

/// In cgroup v1, a limit of at least this many bytes means "no limit". No machine has this much memory.
const NO_LIMIT: u64 = 1 << 60;

/// Returns the limits of those control groups of this process that are mounted.
fn limits(read: &dyn Fn(&Path) -> Option<String>) -> Vec<Left> {
    let (Some(ours), Some(mounts)) = (read(Path::new("/proc/self/cgroup")), read(Path::new("/proc/self/mountinfo")))
    else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for mount in mounts.lines().filter_map(Mount::parse) {
        let group = ours.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let is_its =
                if mount.is_v2 { controllers.is_empty() } else { controllers.split(',').any(|one| one == "memory") };
            is_its.then(|| Path::new(path))
        });
        // The group is outside the mounted part of the hierarchy, so its limit is not known.
        let Some(below) = group.and_then(|group| group.strip_prefix(&mount.root).ok()) else { continue };
        if below.components().any(|part| part == std::path::Component::ParentDir) {
            continue;
        }
        let version = if mount.is_v2 { V2 } else { V1 };
        for directory in mount.at.join(below).ancestors().take_while(|directory| directory.starts_with(&mount.at)) {
            found.extend(limit_of(directory, &version, read));
        }
    }
    found
}

fn limit_of(directory: &Path, version: &Version, read: &dyn Fn(&Path) -> Option<String>) -> Option<Left> {
    let number = |name: &str| read(&directory.join(name))?.trim().parse::<u64>().ok(); // "max" does not parse: no limit
    let stat = read(&directory.join("memory.stat")).unwrap_or_default();
    // In cgroup v1, the limit imposed by ancestor groups, whether or not these are mounted here.
    let inherited = value_in(&stat, "hierarchical_memory_limit");
    let limit = number(version.limit).into_iter().chain(inherited).min().filter(|&limit| limit < NO_LIMIT)?;
    let reclaimable: u64 = version.reclaimable.iter().filter_map(|name| value_in(&stat, name)).sum();
    let used = number(version.used)?.saturating_sub(reclaimable);
    Some(Left { limit, free: limit.saturating_sub(used) })
}

/// A mounted hierarchy that may contain the memory controller: a line of proc_pid_mountinfo(5).
struct Mount {
    is_v2: bool,
    /// The part of the hierarchy that is mounted.
    root: PathBuf,
    /// The mount point.
    at: PathBuf,
}

impl Mount {
    fn parse(line: &str) -> Option<Mount> {
        let (fields, more) = line.split_once(" - ")?;
        let mut more = more.split(' ');
        let is_v2 = match more.next()? {
            "cgroup2" => true,
            "cgroup" if more.nth(1)?.split(',').any(|option| option == "memory") => false,
            _ => return None,
        };
        let mut fields = fields.split(' ').skip(3);
        Some(Mount { is_v2, root: unescaped(fields.next()?), at: unescaped(fields.next()?) })
    }
}

/// Decodes octal escapes such as `\040`, which stand for spaces and other special characters.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, more @ ..] = rest {
        let digits = (*byte == b'\\').then(|| more.get(..3)).flatten();
        let code = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*byte));
        rest = code.map_or(more, |_| &more[3..]);
    }
    PathBuf::from(<OsString as OsStringExt>::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn found(files: &[(&str, &str)]) -> Vec<Left> {
        let files: HashMap<&Path, &str> = files.iter().map(|(path, text)| (Path::new(*path), *text)).collect();
        limits(&|path| files.get(path).map(|text| (*text).to_owned()))
    }

    #[test]
    fn a_container_with_the_second_version_sees_its_own_limit() {
        let files = [
            ("/proc/self/cgroup", "0::/\n"),
            ("/proc/self/mountinfo", "1 2 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n"),
            ("/sys/fs/cgroup/memory.max", "67108864\n"),
            ("/sys/fs/cgroup/memory.current", "12582912\n"),
            ("/sys/fs/cgroup/memory.stat", "anon 2097152\nfile 10485760\ninactive_file 6291456\nactive_file 2097152\n"),
        ];
        assert_eq!(found(&files), [Left { limit: 64 * MIB, free: 60 * MIB }]);
    }

    #[test]
    fn of_all_groups_above_each_counts() {
        let files = [
            ("/proc/self/cgroup", "0::/a/b\n"),
            ("/proc/self/mountinfo", "1 2 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n"),
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/b/memory.current", "1048576\n"),
            ("/sys/fs/cgroup/a/memory.max", "8388608\n"),
            ("/sys/fs/cgroup/a/memory.current", "4194304\n"),
        ];
        assert_eq!(found(&files), [Left { limit: 8 * MIB, free: 4 * MIB }]);
    }

    #[test]
    fn the_first_version_tells_of_groups_that_are_not_mounted_here() {
        let stat = "hierarchical_memory_limit 33554432\ntotal_inactive_file 1048576\ntotal_active_file 0\n";
        let files = [
            ("/proc/self/cgroup", "4:cpu,memory:/docker/ab\n0::/\n"),
            (
                "/proc/self/mountinfo",
                "1 2 0:30 /docker/ab /sys/fs/cgroup/with\\040space ro - cgroup cgroup rw,memory\n\
                 1 2 0:31 /docker/ab /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n",
            ),
            ("/sys/fs/cgroup/with space/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/sys/fs/cgroup/with space/memory.usage_in_bytes", "5242880\n"),
            ("/sys/fs/cgroup/with space/memory.stat", stat),
        ];
        assert_eq!(found(&files), [Left { limit: 32 * MIB, free: 28 * MIB }]);
    }

    #[test]
    fn what_cannot_be_found_out_is_no_limit() {
        let mount = "1 2 0:26 /other /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(found(&[]), []);
        assert_eq!(found(&[("/proc/self/cgroup", "0::/a\n"), ("/proc/self/mountinfo", mount)]), []);
        assert_eq!(found(&[("/proc/self/cgroup", "nonsense\n::\n"), ("/proc/self/mountinfo", "- cgroup2\n")]), []);
        let outside = [
            ("/proc/self/cgroup", "0::/../x\n"),
            ("/proc/self/mountinfo", "1 2 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n"),
            ("/sys/fs/cgroup/memory.max", "1\n"),
            ("/sys/fs/cgroup/memory.current", "1\n"),
        ];
        assert_eq!(found(&outside), []);
        assert!(memory_limit().is_some(), "the machine's own memory, at least");
    }
}
