//! Starts the first command of README.md in a container that has a read-only root, limited memory and an unprivileged user, and in which
//! some system calls are refused.
//!
//! The test needs root, and writable control groups for memory and CPU. Without control groups it prints a message and passes.
//! `shm/src/memory/memory_limit.rs` tests the parsing of control group files without control groups.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::limit::InTime as _;
use common::refuse::{NEWER, Refuse, arguments};
use common::{Server, http, program, wait_until};
use tempfile::TempDir;

/// Prints a line that, unlike a line from `eprintln!`, is shown even if the test passes.
fn say(text: &str) {
    std::io::stderr().write_all(format!("container: {text}\n").as_bytes()).unwrap();
}

/// A control group with a limit, which is removed on drop.
struct Group(PathBuf);

impl Group {
    /// Creates a group with this much memory.
    fn create(bytes: u64) -> Result<Self, String> {
        let bytes = bytes.to_string();
        Self::limited("memory", &[("memory.limit_in_bytes", &bytes)], ("memory.max", &bytes))
    }

    /// Creates a group that is limited to one CPU.
    fn of_one_processor() -> Result<Self, String> {
        Self::limited(
            "cpu",
            &[("cpu.cfs_quota_us", "100000"), ("cpu.cfs_period_us", "100000")],
            ("cpu.max", "100000 100000"),
        )
    }

    /// Creates a group. `v1` and `v2` list the files of cgroup v1 and v2 and the values to write to them. The error states why no group can
    /// be created.
    fn limited(controller: &str, v1: &[(&str, &str)], v2: (&str, &str)) -> Result<Self, String> {
        let [ours, mounts] =
            ["cgroup", "mountinfo"].map(|name| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap());
        let mount_of = |kind: &str, option: &str| {
            let is_it = |line: &&str| {
                line.split_once(" - ").is_some_and(|(_, end)| {
                    end.starts_with(kind) && (option.is_empty() || end.split([',', ' ']).any(|one| one == option))
                })
            };
            let fields: Vec<&str> = mounts.lines().find(is_it)?.split(' ').collect();
            Some((PathBuf::from(fields[3]), PathBuf::from(fields[4])))
        };
        let path_of = |is_it: &dyn Fn(&str) -> bool| {
            ours.lines().find_map(|line| line.split_once(':')?.1.split_once(':').filter(|(names, _)| is_it(names)))
        };
        let of_v1 =
            mount_of("cgroup ", controller).zip(path_of(&|names| names.split(',').any(|name| name == controller)));
        let of_v2 = mount_of("cgroup2 ", "").zip(path_of(&str::is_empty));
        let mut causes = Vec::new();
        for (found, limits) in [(of_v1, v1), (of_v2, &[v2])] {
            let Some(((root, at), (_, path))) = found else { continue };
            let Ok(below) = Path::new(path).strip_prefix(&root) else { continue };
            let name = format!("forkyard-test-{}-{}", std::process::id(), limits[0].1.replace(' ', "-"));
            let directory = at.join(below).join(name);
            let made = std::fs::create_dir(&directory).map(|()| Self(directory.clone()));
            let limit = |group| {
                limits.iter().try_for_each(|(file, value)| std::fs::write(directory.join(file), value)).map(|()| group)
            };
            match made.and_then(limit) {
                Ok(group) => return Ok(group),
                Err(error) => causes.push(format!("{}/{}: {error}", directory.display(), limits[0].0)),
            }
        }
        Err(format!("no control group for {controller} can be made here: {}", causes.join("; ")))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The group cannot be removed while processes that have just exited are still counted.
        if !std::thread::panicking() {
            wait_until("the control group is empty", || std::fs::remove_dir(&self.0).ok());
        }
    }
}

/// A directory that the container can read, with copies of the programs that user `nobody` may execute.
struct Image {
    directory: TempDir,
    refuse: Refuse,
}

impl Image {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let refuse = Refuse::compile();
        for (from, to) in [(program("pages"), "pages"), (refuse.path.clone(), "refuse")] {
            let to = directory.path().join(to);
            std::fs::copy(from, &to).unwrap();
            std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { directory, refuse }
    }

    /// Returns the command that runs `pages` in a container. Nothing is writable, `/dev/shm` is tiny, the container has its own network
    /// namespace, the user (`nobody`) has no capabilities, and recent system calls do not exist.
    fn pages(&self, group: &Group) -> Command {
        let script = "set -e; group=$1; shift
            echo $$ > \"$group/cgroup.procs\"
            mount -t tmpfs -o size=64k tmpfs /dev/shm
            cut -d' ' -f5 /proc/self/mountinfo | sort -r | while read -r at; do
                case $at in /proc*|/sys*) ;; *) mount -o remount,bind,ro \"$at\" 2> /dev/null || true ;; esac
            done
            ! touch /tmp/written 2> /dev/null
            ! touch /dev/shm/written 2> /dev/null
            ip link set lo up
            exec setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \"$@\"";
        let _ = &self.refuse;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "--ipc", "sh", "-c", script, "sh"]).arg(&group.0);
        command.arg(self.directory.path().join("refuse")).args(arguments(libc::ENOSYS, NEWER));
        command.arg(self.directory.path().join("pages"));
        for variable in ["TMPDIR", "XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY"] {
            command.env_remove(variable);
        }
        command
    }
}

/// Sends a request to a server in its own network namespace.
fn get(server: &Server, target: &'static str) -> http::Response {
    let pid = server.pid();
    let asked = std::thread::spawn(move || {
        let network = File::open(format!("/proc/{pid}/ns/net")).unwrap();
        nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        http::get("127.0.0.1:8080", target).unwrap()
    });
    asked.join().unwrap()
}

#[test]
fn the_first_command_in_the_readme_serves_in_a_small_read_only_container() {
    assert!(nix::unistd::geteuid().is_root(), "this test creates a container: run it as root");
    let group = match Group::create(64 << 20) {
        Ok(group) => group,
        Err(cause) => return say(&format!("NOT RUN: {cause}")),
    };
    let image = Image::new();
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    assert!(
        readme.contains("cargo run --release --example pages -- --workers 2 "),
        "README.md starts with the command that the test runs"
    );
    let mut server = Server::start_command(image.pages(&group).args(["--workers", "2"]));
    assert_eq!(get(&server, "/").status, 200);
    let page = get(&server, "/page/7");
    assert_eq!((page.status, get(&server, "/page/7").text()), (200, page.text()), "the page is cached");
    server.stop();
    let log = server.log();
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
    let expected = ["no place for the socket", "the page cache has 16 MiB", "pidfd_open"];
    assert!(warnings.len() == 3 && expected.iter().all(|what| log.contains(what)), "one line for each: {log}");
    assert!(!log.contains("ERROR"), "{log}");
}

#[test]
fn a_cache_larger_than_the_containers_memory_is_an_error_and_not_a_silent_death() {
    assert!(nix::unistd::geteuid().is_root(), "this test creates a container: run it as root");
    let group = match Group::create(100 << 20) {
        Ok(group) => group,
        Err(cause) => return say(&format!("NOT RUN: {cause}")),
    };
    let image = Image::new();
    let run = |arguments: &[&str]| {
        let output = image.pages(&group).args(arguments).output_in_time().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for flags in [["--cache", "256M"], ["--events", "256M"]] {
        for mode in [&[][..], &["check"]] {
            let (status, said) = run(&[mode, &flags].concat());
            let limit = said.contains("the memory limit of this container or unit is 100 MiB");
            assert!(status == Some(1) && limit && said.contains(&format!("with {}", flags[0])), "{status:?} {said}");
        }
    }
    let (status, said) = run(&["check"]);
    assert!(status == Some(0) && said.contains("the page cache has 25 MiB"), "{said}");
    // By default, the page cache has a quarter of the memory. A larger size, such as half of the memory, can be requested explicitly.
    let mut server = Server::start_command(image.pages(&group).args(["--workers", "1", "--cache", "50M"]));
    assert_eq!(get(&server, "/").status, 200);
    server.stop();
}

#[test]
fn a_worker_killed_for_memory_is_logged_as_such_and_its_client_gets_502() {
    assert!(nix::unistd::geteuid().is_root(), "this test creates a control group: run it as root");
    let group = match Group::create(160 << 20) {
        Ok(group) => group,
        Err(cause) => return say(&format!("NOT RUN: {cause}")),
    };
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""]).arg(&group.0).arg(program("crashy"));
    let mut server = Server::start_command(command.args([
        "--bind",
        "http:127.0.0.1:0",
        "--workers",
        "2",
        "--cache",
        "4M",
        "--events",
        "0",
    ]));
    assert_eq!(http::get(&server.http(), "/leak/400").unwrap().status, 502);
    let line = server.wait_for("worker died");
    assert!(line.contains("signal=KILL") && line.contains("cause=oom-kill") && line.contains("/leak/400"), "{line}");
    assert_eq!(http::get(&server.http(), "/leak/1").unwrap().status, 200);
    server.stop();
}

#[test]
fn auto_starts_at_most_one_worker_per_processor_of_the_container() {
    assert!(nix::unistd::geteuid().is_root(), "this test creates a control group: run it as root");
    let group = match Group::of_one_processor() {
        Ok(group) => group,
        Err(cause) => return say(&format!("NOT RUN: {cause}")),
    };
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""]).arg(&group.0).arg(program("hello"));
    let mut server = Server::start_command(command.args(["--bind", "http:127.0.0.1:0", "--workers", "auto"]));
    assert_eq!(server.workers().len(), 1);
    server.stop();
}

#[test]
fn a_cache_file_that_does_not_fit_on_the_disk_is_an_error_with_its_path() {
    assert!(nix::unistd::geteuid().is_root(), "this test mounts a file system: run it as root");
    let script = "mount -t tmpfs -o size=1m tmpfs /mnt && \"$@\"; status=$?; du -k /mnt/cache 1>&2; exit $status";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(program("hello"));
    let output = command
        .args(["--bind", "http:127.0.0.1:0", "--cache", "8M", "--cache-file", "/mnt/cache"])
        .output_in_time()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("No space left on device") && said.contains("--cache-file"), "{said}");
    assert!(said.contains("MiB for the cache file") && said.contains("its file system has 1 MiB free"), "{said}");
    assert!(
        said.lines().any(|line| line.split_ascii_whitespace().eq(["0", "/mnt/cache"])),
        "the space is freed: {said}"
    );
}

#[test]
fn reaching_the_file_size_limit_is_an_error_and_not_a_signal() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cache").to_string_lossy().into_owned();
    for more in [&[][..], &["--cache-file", &file]] {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -f 1000 && exec \"$0\" \"$@\""]).arg(program("hello"));
        let output = command.args(["--bind", "http:127.0.0.1:0", "--cache", "8M"]).args(more).output_in_time().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains("ulimit -f"), "{:?} {said}", output.status);
    }
}
