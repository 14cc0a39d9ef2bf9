//! Shared memory that another process has overwritten, or whose file it has truncated. The server keeps running and logs the damage once,
//! and a reload creates new memory.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use common::limit::InTime as _;
use common::sse::{Source, Way};
use common::{Helper, Server, StopOnDrop, http, is_gone, line_of, program, wait_until};

struct Scribbled {
    server: Server,
    name: &'static str,
    control: PathBuf,
    _directory: tempfile::TempDir,
}

impl Scribbled {
    fn start(name: &'static str, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let control = directory.path().join("control");
        let mut command = Command::new(program(name));
        command.args(["--bind", "http:127.0.0.1:0", "--workers", "2", "--control"]).arg(&control).args(arguments);
        Self { server: Server::start_command(&mut command), name, control, _directory: directory }
    }

    /// Overwrites all shared memory, as a program that has `FORKYARD_SHM` can.
    fn scribble(&self, memory: &File, with: &str) {
        let length = memory.metadata().unwrap().len();
        let mut random = fastrand::Rng::with_seed(length);
        let mut piece = vec![0; 1 << 20];
        for at in (0..length).step_by(piece.len()) {
            match with {
                "zeroes" => {}
                "ones" => piece.fill(0xff),
                "random bytes" => random.fill(&mut piece),
                other => panic!("{other}"),
            }
            let rest = usize::try_from(length - at).unwrap().min(piece.len());
            memory.write_all_at(&piece[..rest], at).unwrap();
        }
    }

    /// Returns the shared memory of the server's current generation.
    fn memory(&self) -> File {
        let directory = format!("/proc/{}/fd", self.server.pid());
        let is_memory =
            |path: &Path| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:forkyard"));
        let mut found = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let path = found.find(|path| is_memory(path)).expect("the master holds the memory");
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(program(self.name));
        command.args(arguments).env("FORKYARD_CONTROL", &self.control).output_in_time().unwrap()
    }

    fn refusal(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        assert!(!output.status.success(), "{arguments:?} {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Reloads, and returns the output of the reload once the old processes are gone.
    fn reload(&self) -> String {
        let old = self.server.children();
        let output = self.ask(&["reload"]);
        let said = [&output.stdout[..], &output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(output.status.success(), "{said}\n{}", self.server.log());
        wait_until("the old processes exit", || old.iter().all(|&pid| is_gone(pid)).then_some(()));
        said
    }
}

#[test]
fn overwritten_memory_is_logged_once_and_a_reload_replaces_it() {
    for with in ["zeroes", "ones", "random bytes"] {
        let mut site = Scribbled::start("pages", &["--cache", "4M"]);
        let address = site.server.http();
        let page = || http::get(&address, "/page/1").unwrap();
        let first = page().text();
        assert!(page().text() == first, "the page is cached");
        let memory = site.memory();
        site.scribble(&memory, with);
        let line = site.server.wait_for("the shared memory is damaged");
        assert!(line.contains("ERROR") && line.contains("reload"), "{line}");
        assert!((0..4).all(|_| page().status == 200), "{with}: requests are answered");
        for command in [&["cache", "stats"][..], &["events", "ls"]] {
            let why = site.refusal(command);
            assert!(why.contains("the shared memory is damaged") && why.contains("a reload replaces it"), "{why}");
        }
        let said = site.reload();
        assert!(said.contains("replaced the damaged shared memory"), "{with}: {said}");
        let first = page().text();
        assert!((0..8).all(|_| page().text() == first), "{with}: the page is cached again, for both workers");
        assert!(site.ask(&["cache", "stats"]).status.success() && site.ask(&["events", "ls"]).status.success());
        let said = site.reload();
        assert!(!said.contains("memory"), "undamaged memory is kept: {said}");
        assert!(page().text() == first, "the cache is kept with the memory");
        site.server.stop();
        assert_eq!(site.server.log().matches("the shared memory is damaged").count(), 1, "{}", site.server.log());
    }
}

#[test]
fn a_subscriber_from_before_the_replacement_of_the_memory_sees_a_gap_and_then_all_events() {
    let mut site = Scribbled::start("stream", &["--events", "1M"]);
    let (address, bind) = (site.server.http(), site.server.binds[0].clone());
    let publish = |text: &str| http::post(&address, "/publish/news", text.as_bytes()).unwrap().status;
    let mut source = Source::open(Way::Http, &bind, "/events?topics=news", "").unwrap();
    assert_eq!(publish("before"), 200);
    assert_eq!(source.next().data, "before");
    let memory = site.memory();
    site.scribble(&memory, "random bytes");
    site.server.wait_for("the shared memory is damaged");
    site.reload();
    while source.event().is_ok_and(|event| event.is_some()) {}
    let mut source = Source::open(Way::Http, &bind, "/events?topics=news", &source.last_id).unwrap();
    assert_eq!(source.next().name, "gap");
    wait_until("the new generation serves", || (publish("after") == 200).then_some(()));
    assert_eq!(source.next().data, "after");
    site.server.stop();
}

#[test]
fn a_damaged_cache_file_is_replaced_by_a_new_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pages");
    let mut site = Scribbled::start("pages", &["--cache", "4M", "--cache-file", path.to_str().unwrap()]);
    let address = site.server.http();
    let memory = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    site.scribble(&memory, "zeroes");
    site.server.wait_for("the shared memory is damaged");
    let said = site.reload();
    assert!(said.contains("replaced the damaged shared memory"), "{said}");
    let first = http::get(&address, "/page/1").unwrap().text();
    site.server.stop();
    let mut again = Scribbled::start("pages", &["--cache", "4M", "--cache-file", path.to_str().unwrap()]);
    assert!(again.server.log().contains("cache is warm"), "{}", again.server.log());
    assert!(http::get(&again.server.http(), "/page/1").unwrap().text() == first);
    again.server.stop();
}

/// Damages a cache file while requests are being answered.
fn damage_file(file: &File, how: &str) {
    let whole = file.metadata().unwrap().len();
    match how {
        "emptied" => file.set_len(0).unwrap(),
        "cut in the middle" => file.set_len(whole / 2).unwrap(),
        "cut at the end" => file.set_len(whole - 4096).unwrap(),
        "emptied and extended again" => {
            file.set_len(0).unwrap();
            file.set_len(whole).unwrap();
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_truncated_cache_file_kills_no_process_and_fails_no_request() {
    for how in ["emptied", "cut in the middle", "cut at the end", "emptied and extended again"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages");
        let arguments = ["--cache", "4M", "--hang-timeout", "20", "--cache-file", path.to_str().unwrap()];
        let mut site = Scribbled::start("pages", &arguments);
        let address = site.server.http();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let is_over = AtomicBool::new(false);
        let status = |number: usize| http::get(&address, &format!("/page/{number}?ms=1")).map(|page| page.status);
        let workers = std::thread::scope(|scope| {
            let _stop = StopOnDrop(&is_over);
            for client in 0..4 {
                let (status, is_over) = (&status, &is_over);
                scope.spawn(move || {
                    // The thousand keys are in all shards of the cache.
                    for number in (0..1000).cycle().skip(client * 250).take_while(|_| !is_over.load(Ordering::SeqCst)) {
                        let outcome = status(number);
                        assert!(matches!(outcome, Ok(200)), "{how}: page {number}: {outcome:?}");
                    }
                });
            }
            let workers = site.server.children();
            damage_file(&file, how);
            site.server.wait_for(if how.ends_with("again") { "the shared memory" } else { "its file was truncated" });
            (0..100).for_each(|number| assert_eq!(status(number).unwrap(), 200, "{how}"));
            workers
        });
        assert_eq!(site.server.children(), workers, "{how}: no worker has died\n{}", site.server.log());
        let said = site.reload();
        assert!(said.contains("replaced the damaged shared memory"), "{how}: {said}");
        let first = http::get(&address, "/page/1").unwrap().text();
        assert!(
            (0..8).all(|_| http::get(&address, "/page/1").unwrap().text() == first),
            "{how}: the page is cached again"
        );
        site.server.stop();
        let log = site.server.log();
        assert!(!log.contains("signal=") && !log.contains("the next start may drop its content"), "{how}: {log}");
        let mut again = Scribbled::start("pages", &arguments);
        assert!(again.server.log().contains("cache is warm"), "{how}: {}", again.server.log());
        again.server.stop();
    }
}

#[test]
fn a_truncated_file_with_an_event_log_ends_neither_the_relay_nor_its_followers() {
    let directory = tempfile::tempdir().unwrap();
    let (path, socket) = (directory.path().join("pages"), directory.path().join("publish"));
    let arguments = ["--cache", "4M", "--events", "1M", "--cache-file", path.to_str().unwrap(), "--events-socket"];
    let mut site = Scribbled::start("stream", &[&arguments[..], &[socket.to_str().unwrap()]].concat());
    let address = site.server.http();
    let publish = || http::post(&address, "/publish/news", b"text").unwrap().status;
    let mut tail = Command::new(program("stream"));
    tail.args(["events", "tail", "news", "--from", "1"]).env("FORKYARD_CONTROL", &site.control);
    let mut tail = Helper::start(tail.stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut events = tail.0.stdout.take().unwrap();
    assert_eq!(publish(), 200);
    assert!(line_of(&mut events, "the first event").contains("text"));
    let sender = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let send = || sender.send_to(b"news\n\ntext", &socket).unwrap();
    send();
    line_of(&mut events, "the second event");
    let children: BTreeSet<i32> = site.server.children();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!(publish(), 400);
    send();
    site.server.wait_for("its file was truncated");
    site.server.logged("event not published: the file of the shared memory was truncated");
    assert!(tail.0.try_wait().unwrap().is_none(), "the tail is still waiting");
    assert_eq!(site.server.children(), children, "{}", site.server.log());
    site.reload();
    assert_eq!(publish(), 200);
    site.server.stop();
    assert!(!site.server.log().contains("signal="), "{}", site.server.log());
}
