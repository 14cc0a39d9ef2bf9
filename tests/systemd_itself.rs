//! Tests the unit files in scripts/systemd with systemd itself: a manager in its own namespaces and control group, isolated from the
//! machine. `tests/programs/systemd.sh` runs inside these namespaces.
//!
//! The test needs root, and a writable cgroup v2 hierarchy. Some containers have no such hierarchy; in these containers, the test reports
//! what it has tried, and passes. Any other problem is a failure.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::io::{Error, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::limit::InTime as _;
use common::{program, wait_until};

/// Prints a line that, unlike a line from `eprintln!`, is shown even if the test passes.
fn say(text: &str) {
    std::io::stderr().write_all(format!("systemd_itself: {text}\n").as_bytes()).unwrap();
}

/// A control group below the test's own group, which is removed on drop.
struct Group(PathBuf);

impl Group {
    fn create() -> Result<Self, Error> {
        let ours = std::fs::read_to_string("/proc/self/cgroup")?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let ours = ours.lines().find_map(|line| line.strip_prefix("0::"));
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let (Some(ours), Some(mount)) = (ours, mount) else {
            return Err(Error::new(ErrorKind::Unsupported, "no cgroup2 is mounted"));
        };
        // The mounted part of the hierarchy, and its mount point.
        let fields: Vec<&str> = mount.split(' ').collect();
        let ours = Path::new(ours).strip_prefix(fields[3]).map_err(Error::other)?;
        let directory = Path::new(fields[4]).join(ours).join(format!("forkyard-test-{}", std::process::id()));
        std::fs::create_dir(&directory)?;
        Ok(Self(directory))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Removes a group and the groups below it, which the manager has created. Fails while the groups contain processes.
fn remove(group: &Path) -> bool {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    std::fs::remove_dir(group).is_ok()
}

#[test]
fn the_unit_files_work_under_systemd() {
    if !nix::unistd::geteuid().is_root() {
        return say("NOT RUN: a systemd of its own needs root");
    }
    let group = match Group::create() {
        Ok(group) => group,
        Err(error) => {
            let lacking = [ErrorKind::Unsupported, ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem];
            assert!(lacking.contains(&error.kind()), "no control group can be created for a separate systemd: {error}");
            return say(&format!("NOT RUN: no control group for a systemd of its own can be made here: {error}"));
        }
    };
    let (pages, crashy) = (program("pages"), program("crashy"));
    let programs = pages.parent().filter(|directory| crashy.starts_with(directory)).unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // All processes stay inside the group. The first process of the pid namespace dies with the test, and the kernel then kills all other
    // processes in the namespace.
    let script = "echo $$ > \"$1\" || exit; shift; exec setpriv --pdeathsig KILL \
                  unshare --mount --pid --fork --kill-child --cgroup bash tests/programs/systemd.sh \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(group.0.join("cgroup.procs"))
        .arg(here.join("scripts/systemd"))
        .arg(programs)
        .current_dir(here)
        .stdin(Stdio::null())
        .output_in_time()
        .unwrap();
    let [said, log] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{}\n{said}{log}", output.status);
    for promise in [
        "the first connection starts the service",
        "the hardening is in force",
        "start waits until all workers are ready",
        "reload replaces the workers",
        "an upgrade keeps the main pid",
        "a restart fails no request, and the page cache survives it",
        "killed and replaced by the watchdog",
        "stop lets a request be finished",
        "Type=notify-reload",
    ] {
        assert!(said.contains(promise), "{promise}: {said}{log}");
    }
    said.lines().filter(|line| line.starts_with("NOT RUN")).for_each(say);
    wait_until("the control group is removed", || remove(&group.0).then_some(()));
}
