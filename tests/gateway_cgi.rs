//! CGI programs behind gateways (`--backend cgi`): a runner starts the program for each request.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use common::http::{get, post};
use common::recipes::{Recipe, descendants, git, page, sent, serves_page, stops, survives_reload};
use common::{Server, is_gone, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PROGRAM: &str = include_str!("programs/cgi.sh");

struct Cgi {
    server: Server,
    recipe: Recipe,
}

impl Cgi {
    fn start(options: &[&str]) -> Self {
        Self::start_with(options, |_| {})
    }

    fn start_with(options: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let recipe = Recipe::new(&[]);
        let path = recipe.path("cgi.sh");
        std::fs::write(&path, PROGRAM).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let options = [&["--backend", "cgi"], options].concat();
        let mut command = recipe.command(&options, &["./cgi.sh"]);
        command.env("FAULTY_DIR", recipe.path(""));
        change(&mut command);
        Self { server: Server::start_command(&mut command), recipe }
    }

    /// Returns the pid that the program has written into this file.
    fn pid(&self, name: &str) -> i32 {
        let path = self.recipe.path(name);
        wait_until("the program has begun", || std::fs::read_to_string(&path).ok()?.trim().parse().ok())
    }

    fn deaths(&self) -> usize {
        self.server.log().matches("] app process died").count()
    }
}

#[test]
fn bodies_pass_in_both_directions() {
    let mut cgi = Cgi::start(&[]);
    for length in [0, 1, 100_000, 5 << 20] {
        let body: Vec<u8> = (0..length).map(|number: u32| number.to_le_bytes()[1]).collect();
        assert!(sent(&cgi.server, "/echo", &body).body == body, "{length} bytes");
    }
    // The program does not read its input.
    for length in [10, 5 << 20] {
        assert_eq!(sent(&cgi.server, "/ignore", &vec![b'x'; length]).text(), "ignored\n");
    }
    assert_eq!(page(&cgi.server, "/a%20b").text(), "/a b\n");
    let response = page(&cgi.server, "/status");
    assert_eq!((response.status, response.text().as_str()), (404, "no\n"));
    stops(&mut cgi.server);
}

#[test]
fn the_environment_is_that_of_the_server_and_the_request() {
    let mut cgi = Cgi::start_with(&["--env", "MINE=1"], |command| {
        command.env("HTTP_PROXY", "stale").env("CONTENT_TYPE", "stale").env("FORKYARD_SLOT", "stale");
    });
    let text = page(&cgi.server, "/env?a&b=%20").text();
    for line in [
        "GATEWAY_INTERFACE=CGI/1.1",
        "REQUEST_METHOD=GET",
        "QUERY_STRING=a&b=%20",
        "PATH_INFO=/env",
        "SCRIPT_NAME=",
        "REMOTE_ADDR=127.0.0.1",
        "HTTP_HOST=localhost",
        "MINE=1",
        "FORKYARD_GENERATION=1",
    ] {
        assert!(text.lines().any(|other| other == line), "{line} in {text}");
    }
    assert!(!text.contains("stale") && !text.contains("FORKYARD_SHM"), "{text}");
    cgi.server.stop();
}

#[test]
fn the_program_has_the_privileges_of_an_app_process() {
    let is_root = nix::unistd::geteuid().is_root();
    let privileges: &[&str] = if is_root { &["--user", "nobody"] } else { &[] };
    let mut cgi = Cgi::start(
        &[&["--chdir", "/", "--rlimit", "nofile=300", "--nice", "3", "--temp-dir", "/tmp"], privileges].concat(),
    );
    // The directory of the test is accessible for its user only.
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(cgi.recipe.path(""), open).unwrap();
    let text = page(&cgi.server, "/limits").text();
    let expected = if is_root { "/\n300\n3\n65534\n" } else { "/\n300\n3\n" };
    assert!(text.starts_with(expected), "{text}");
    cgi.server.stop();
}

#[test]
fn messages_are_logged_with_their_request() {
    let mut cgi = Cgi::start(&[]);
    assert_eq!(page(&cgi.server, "/stderr").text(), "done\n");
    for message in ["one", "two"] {
        let line = cgi.server.logged(&format!("] {message} slot="));
        assert!(line.contains("request=\"GET /stderr\""), "{line}");
    }
    cgi.server.stop();
}

#[test]
fn a_program_that_fails_without_a_response_is_answered_with_502() {
    let mut cgi = Cgi::start(&[]);
    for target in ["/fail", "/none"] {
        assert_eq!(page(&cgi.server, target).status, 502, "{target}");
    }
    for message in ["] failing slot=", "the CGI program exited with status 3"] {
        assert!(cgi.server.logged(message).contains("request=\"GET /fail\""));
    }
    std::fs::remove_file(cgi.recipe.path("cgi.sh")).unwrap();
    assert_eq!(page(&cgi.server, "/x").status, 502);
    assert!(cgi.server.logged("cannot execute ./cgi.sh").contains("request=\"GET /x\""));
    assert_eq!(cgi.deaths(), 0);
    cgi.server.stop();
}

#[test]
fn the_death_of_a_program_counts_as_the_death_of_its_request() {
    let mut cgi = Cgi::start(&["--retries", "1", "--quarantine", "3", "--respawn-rate", "1000"]);
    assert_eq!(page(&cgi.server, "/segv").status, 502);
    assert!(cgi.server.logged("] app process died").contains("signal=SEGV"));
    cgi.server.logged("the request is repeated");
    // At the third death, the gateway may repeat the request before it has received the quarantine: 502 instead of 503.
    let status = page(&cgi.server, "/segv").status;
    assert!([502, 503].contains(&status), "{status}");
    cgi.server.logged("quarantined a request");
    assert_eq!(page(&cgi.server, "/segv").status, 503);
    assert!((3..=4).contains(&cgi.deaths()));
    assert_eq!(page(&cgi.server, "/x").status, 200);
    get(&cgi.server.http(), "/half").map(|response| response.body.len()).expect_err("the response is not complete");
    cgi.server.stop();
}

#[test]
fn a_program_that_hangs_is_killed_with_its_runner() {
    let mut cgi = Cgi::start(&["--request-timeout", "1s"]);
    assert_eq!(page(&cgi.server, "/hang").status, 504);
    let pid = cgi.pid("hang");
    wait_until("the program is killed", || is_gone(pid).then_some(()));
    assert_eq!(page(&cgi.server, "/x").status, 200);
    cgi.server.stop();
}

#[test]
fn a_program_does_not_outlive_its_runner() {
    let mut cgi = Cgi::start(&["--workers", "1", "--retries", "0"]);
    let address = cgi.server.http();
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| post(&address, "/hang", b"").unwrap().status);
        let pid = cgi.pid("hang");
        let runner = common::process(pid).unwrap().parent;
        let below = descendants(&cgi.server);
        kill(Pid::from_raw(runner), Signal::SIGKILL).unwrap();
        assert_eq!(answer.join().unwrap(), 502);
        wait_until("the program and its children are killed", || {
            let names = ["cgi.sh", "sleep"];
            let mut left = below.iter().filter_map(|&pid| common::process(pid)).filter(|process| !is_gone(process.pid));
            (!left.any(|process| names.contains(&process.name.as_str()))).then_some(())
        });
    });
    assert_eq!(page(&cgi.server, "/x").status, 200);
    cgi.server.stop();
}

#[test]
fn a_process_that_a_program_leaves_behind_does_not_delay_the_response_and_ends_with_the_server() {
    let mut cgi = Cgi::start(&[]);
    assert_eq!(page(&cgi.server, "/behind").text(), "begun\n");
    let pid = cgi.pid("behind");
    assert!(!is_gone(pid));
    cgi.server.stop();
    wait_until("the process is killed", || is_gone(pid).then_some(()));
}

// ---- git ----

/// Creates a repository, and starts a server for it.
fn git_server(recipe: &Recipe) -> Server {
    let root = recipe.path("");
    git(&root, &["init", "--quiet", "--bare", "repository.git"]);
    git(&recipe.path("repository.git"), &["config", "http.receivepack", "true"]);
    let exec_path = git(&root, &["--exec-path"]);
    let backend = format!("{}/git-http-backend", exec_path.trim());
    let mut command = recipe.command(&["--backend", "cgi"], &[&backend]);
    command.env("GIT_PROJECT_ROOT", &root).env("GIT_HTTP_EXPORT_ALL", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    Server::start_command(&mut command)
}

#[test]
fn git_clones_and_pushes_through_its_http_backend() {
    let recipe = Recipe::new(&[]);
    let mut server = git_server(&recipe);
    let address = format!("http://{}/repository.git", server.http());
    let root = recipe.path("");
    git(&root, &["clone", "--quiet", &address, "one"]);
    let (one, two) = (recipe.path("one"), recipe.path("two"));
    let large: Vec<u8> = (0..3_000_000).map(|_| fastrand::u8(..)).collect();
    std::fs::write(one.join("large"), &large).unwrap();
    git(&one, &["add", "large"]);
    git(&one, &["commit", "--quiet", "-m", "large"]);
    git(&one, &["push", "--quiet", "origin", "HEAD:main"]);
    git(&root, &["clone", "--quiet", "--branch", "main", &address, "two"]);
    assert!(std::fs::read(two.join("large")).unwrap() == large);
    let refs = |address: &str, _| {
        let response = get(address, "/repository.git/info/refs?service=git-upload-pack");
        let response = response.map_err(|error| error.to_string())?;
        if response.status == 200 && response.text().contains("refs/heads/main") {
            Ok(())
        } else {
            Err(format!("{response:?}"))
        }
    };
    survives_reload(&mut server, refs);
    stops(&mut server);
}

#[test]
fn cgit_shows_a_repository() {
    let recipe = Recipe::new(&[]);
    recipe.commit("one", "the first commit");
    let config = format!("virtual-root=/\nrepo.url=one\nrepo.path={}\n", recipe.path("one/.git").display());
    std::fs::write(recipe.path("cgitrc"), config).unwrap();
    let mut command = recipe.command(&["--backend", "cgi"], &["/usr/lib/cgit/cgit.cgi"]);
    let mut server = Server::start_command(command.env("CGIT_CONFIG", recipe.path("cgitrc")));
    assert!(page(&server, "/").text().contains("one"));
    serves_page(&mut server, "/one/log/", "the first commit");
}
