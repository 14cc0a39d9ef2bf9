//! The unit files of scripts/systemd under systemd itself: a manager in namespaces and a control group of its own, so that it
//! neither sees nor touches anything of this machine. `tests/programs/systemd.sh` is what happens in there.
//!
//! That needs root, and a hierarchy of control groups that can be written to, which some containers do not have: there the
//! test says so, and what it has tried.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that fails here says where")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::program;

/// A control group below our own, for as long as it is held.
struct Group(PathBuf);

impl Group {
    /// Where systemd would have its groups.
    fn create() -> std::io::Result<Self> {
        let ours = std::fs::read_to_string("/proc/self/cgroup")?;
        let path = |mark: &str| ours.lines().find_map(|line| line.split_once(mark)).map(|(_, path)| path.to_owned());
        let (root, path) = if Path::new("/sys/fs/cgroup/systemd").is_dir() {
            (Path::new("/sys/fs/cgroup/systemd"), path("name=systemd:"))
        } else {
            (Path::new("/sys/fs/cgroup"), path("0::"))
        };
        let path = path.ok_or_else(|| std::io::Error::other("/proc/self/cgroup does not tell our control group"))?;
        let name = format!("forkyard-test-{}", std::process::id());
        let folder = root.join(path.trim_start_matches('/')).join(name);
        std::fs::create_dir(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Removes a group and those below it, which the manager may have left.
fn remove(group: &Path) {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(group);
}

#[test]
fn the_unit_files_do_what_they_promise() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("NOT RUN: a systemd of its own needs root");
    }
    let group = match Group::create() {
        Ok(group) => group,
        Err(error) => return eprintln!("NOT RUN: no control group for a systemd of its own can be made here: {error}"),
    };
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // All that is started in the namespace of processes ends with its first one.
    let script = "echo $$ > \"$1\"; shift; \
                  exec unshare --mount --pid --fork --kill-child --cgroup bash tests/programs/systemd.sh \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(group.0.join("cgroup.procs"))
        .arg(here.join("scripts/systemd"))
        .arg(program("pages"))
        .current_dir(here)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let [said, log] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{}\n{said}{log}", output.status);
    for promise in [
        "the first connection starts the service",
        "start returns when all workers are ready",
        "reload replaces the workers",
        "an upgrade keeps the main pid",
        "the page cache survives it",
        "replaced by the watchdog",
        "stop lets a request be finished",
    ] {
        assert!(said.contains(promise), "{promise}: {said}{log}");
    }
}
