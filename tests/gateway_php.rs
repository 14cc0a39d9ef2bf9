//! App processes that are a php-cgi with children, which share opcache and APCu.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failing test reports its location")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use common::gateway::{Load, Place, Site, Tolerance, scaled};
use common::{is_gone, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CLIENTS: usize = 6;
const BINDS: [&str; 4] = ["--bind", "http:127.0.0.1:0", "--bind", "fastcgi:127.0.0.1:0"];

/// Starts a server whose app processes are php-cgi processes with children: one for each of `concurrency` requests, and one
/// for each of the two gateways.
fn site(workers: usize, concurrency: usize, options: &[&str], variables: &[(&str, &str)]) -> Site {
    let all = workers * (concurrency + 2);
    let (workers, concurrency) = (workers.to_string(), concurrency.to_string());
    let number = ["--workers", &workers, "--app-concurrency", &concurrency, "--respawn-rate", "1000"];
    let place = common::gateway::Place::new();
    let extensions = ["-d", "zend_extension=opcache", "-d", "extension=apcu", "-d", "opcache.file_update_protection=0"];
    let options = [&BINDS, &number[..], options].concat();
    let site = place.start_php(&options, &extensions, variables);
    wait_until("all children have been started", || (children(&site).len() == all).then_some(()));
    site
}

/// Starts a server with the default number of requests at a time.
fn by_default(workers: &str, options: &[&str]) -> (Site, Place) {
    let (place, files) = (Place::new(), Place::new());
    std::fs::write(files.path("index.php"), common::gateway::GATEWAY_PHP).unwrap();
    let settings = format!("workers = \"{workers}\"\n");
    std::fs::write(files.path("settings"), settings).unwrap();
    let (config, root) = (files.text("settings"), files.text(""));
    let mut command = Command::new(common::program("forkyard"));
    command.args(["run", "--control"]).arg(place.path("control")).args(["--config", &config, "--gateways", "2"]);
    command.args(BINDS).args(["--root", &root, "--index", "index.php"]).args(options).args(["--", "php-cgi", "-n"]);
    command.args(["-d", "extension=posix", "-d", "extension=apcu"]);
    command.env("FAULTY_DIR", place.path(""));
    (place.start(&mut command), files)
}

#[test]
fn by_default_one_php_cgi_has_as_many_children_as_workers_and_a_reload_changes_their_number() {
    let (mut site, files) = by_default("1..3", &[]);
    let number = |expected: usize| {
        wait_until("all children have been started", || {
            let apps = site.apps();
            (apps.len() == 1 && children(&site).len() == expected + 2).then_some(apps)
        })
    };
    let first = number(3);
    assert_eq!((0..3).map(|_| site.get("/pid").status).collect::<Vec<_>>(), [200; 3]);
    std::fs::write(files.path("settings"), "workers = 5\n").unwrap();
    let reloaded = site.control(&["reload"]);
    assert!(reloaded.status.success(), "{reloaded:?}");
    assert!(number(5).is_disjoint(&first));
    let held: Vec<_> = (0..5).map(|number| site.hold(&number.to_string(), "/hold")).collect();
    assert_eq!(held.iter().map(|(_, pid)| *pid).collect::<BTreeSet<_>>().len(), 5);
    (0..5).for_each(|number| site.release(&number.to_string()));
    drop(held);
    // There is no space for as many.
    std::fs::write(files.path("settings"), "workers = 100\n").unwrap();
    let reloaded = site.control(&["reload"]);
    let said = format!("{reloaded:?}");
    assert!(said.contains("--workers") && !said.contains("--app-concurrency"), "{said}");
    number(5);
    // Neither is there for separate processes, and --max-requests continues to apply to the children.
    let app = site.apps();
    std::fs::write(files.path("settings"), "workers = 1\nmax-requests = 3\n").unwrap();
    let reloaded = format!("{:?}", site.control(&["reload"]));
    assert!(reloaded.contains("--workers"), "{reloaded}");
    let reloaded = number(5);
    assert!(reloaded.is_disjoint(&app));
    (0..40).for_each(|_| assert_eq!(site.get("/pid").status, 200));
    assert_eq!(number(5), reloaded, "the php-cgi process was not recycled");
    site.server.stop();
}

#[test]
fn max_requests_replaces_children_and_not_their_php_cgi() {
    let (mut site, _files) = by_default("2", &["--max-requests", "10"]);
    let (app, first) = (site.apps(), children(&site));
    wait_until("every child has been replaced", || {
        assert_eq!(site.get("/pid").status, 200);
        children(&site).is_disjoint(&first).then_some(())
    });
    assert_eq!(site.apps(), app);
    site.server.stop();
}

fn children_of(pid: i32) -> BTreeSet<i32> {
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    listed.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Returns the children of all app processes.
fn children(site: &Site) -> BTreeSet<i32> {
    site.apps().into_iter().flat_map(children_of).collect()
}

#[test]
fn the_children_of_a_process_share_apcu_and_opcache() {
    let mut site = site(1, 4, &[], &[]);
    let app = *site.apps().first().unwrap();
    let held: Vec<_> = (0..4).map(|number| site.hold(&number.to_string(), "/hold")).collect();
    let pids: BTreeSet<i32> = held.iter().map(|(_, pid)| *pid).collect();
    assert_eq!(pids.len(), 4);
    assert!(pids.is_subset(&children_of(app)));
    (0..4).for_each(|number| site.release(&number.to_string()));
    for (mut client, _) in held {
        assert_eq!(client.response(false).unwrap().text(), "held\n");
    }
    let mut pids = BTreeSet::new();
    std::thread::scope(|scope| {
        let clients: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (0..25).map(|_| site.get("/shared").text()).collect())).collect();
        let texts: Vec<String> =
            clients.into_iter().flat_map(|client| -> Vec<String> { client.join().unwrap() }).collect();
        let mut counts = BTreeSet::new();
        for text in texts {
            let words: Vec<&str> = text.split_ascii_whitespace().collect();
            let [count, pid, is_cached] = words[..] else { panic!("{text}") };
            counts.insert(count.parse::<u32>().unwrap());
            pids.insert(pid.parse::<i32>().unwrap());
            assert_eq!(is_cached, "1", "{text}");
        }
        assert_eq!(counts, (1..=100).collect(), "one counter for all children");
    });
    assert!(pids.len() > 1, "{pids:?}");
    site.server.stop();
}

#[test]
fn no_get_fails_and_no_post_runs_twice_while_children_are_killed() {
    let mut site = site(2, 3, &[], &[]);
    let load = Load::new(Tolerance::Posts);
    let mut random = fastrand::Rng::with_seed(7);
    let apps = site.apps();
    load.run(&site, CLIENTS, || {
        for _ in 0..scaled(200) {
            if !load.answered(random.u64(1..30)) {
                break;
            }
            let all: Vec<i32> = children(&site).into_iter().collect();
            let victim = all[random.usize(..all.len())];
            kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
            wait_until("the child is replaced", || {
                let all = children(&site);
                (!all.contains(&victim) && all.len() == 10).then_some(())
            });
        }
    });
    site.at_rest();
    assert_eq!(site.apps(), apps, "no app process was replaced");
    site.server.stop();
    assert!(!site.server.log().contains("quarantined"), "{}", site.server.log());
}

#[test]
fn no_get_fails_and_no_post_runs_twice_while_processes_with_children_are_killed() {
    let mut site = site(3, 2, &["--retries", "10"], &[]);
    let load = Load::new(Tolerance::Posts);
    let mut random = fastrand::Rng::with_seed(7);
    load.run(&site, CLIENTS, || {
        for _ in 0..scaled(50) {
            if !load.answered(random.u64(1..50)) {
                break;
            }
            let before = children(&site);
            let victim = site.kill_one(Site::apps, 3, &mut random);
            let orphans: Vec<i32> = before.into_iter().filter(|&pid| !children(&site).contains(&pid)).collect();
            wait_until("its children are gone", || orphans.iter().all(|&pid| is_gone(pid)).then_some(()));
            assert!(is_gone(victim));
        }
    });
    site.at_rest();
    site.server.stop();
}

#[test]
fn no_request_fails_while_children_exit_after_five_requests() {
    let mut site = site(1, 4, &[], &[("PHP_FCGI_MAX_REQUESTS", "5")]);
    let load = Load::new(Tolerance::Nothing);
    let app = site.apps();
    load.run(&site, CLIENTS, || {
        load.answered(scaled(2000));
    });
    site.at_rest();
    assert_eq!(site.apps(), app, "the process has replaced its children itself");
    site.server.stop();
}

#[test]
fn no_request_fails_during_reloads_of_processes_with_children() {
    let mut site = site(1, 4, &[], &[]);
    let load = Load::new(Tolerance::Nothing);
    load.run(&site, CLIENTS, || {
        for _ in 0..scaled(20) {
            let before = children(&site);
            if !load.answered(20) {
                break;
            }
            let output = site.control(&["reload"]);
            assert!(output.status.success(), "{output:?}");
            wait_until("the old children are gone", || before.iter().all(|&pid| is_gone(pid)).then_some(()));
        }
    });
    site.at_rest();
    site.server.stop();
}

#[test]
fn only_the_child_that_hangs_is_killed() {
    let mut site = site(1, 4, &["--request-timeout", "1s", "--quarantine", "2"], &[]);
    let app = *site.apps().first().unwrap();
    for round in 0..2 {
        let before = children_of(app);
        let (mut client, pid) = site.hold("a", "/hold");
        assert_eq!(client.response(false).unwrap().status, 504, "{round}");
        let after = wait_until("the child is replaced", || {
            let after = children_of(app);
            (after.len() == before.len() && !after.contains(&pid)).then_some(after)
        });
        assert_eq!(before.difference(&after).collect::<Vec<_>>(), [&pid], "no other child was killed");
        std::fs::remove_file(site.path("a.in")).unwrap();
    }
    let line = site.server.logged("killed a child of an app process, which hangs");
    assert!(line.contains(&format!("pid={app} child=")) && line.contains("request=\"GET /hold?a\""), "{line}");
    wait_until("the request is refused", || (site.get("/hold?a").status == 503).then_some(()));
    assert_eq!(site.apps(), BTreeSet::from([app]));
    assert_eq!(site.get("/pid").status, 200);
    site.server.stop();
}

/// The other gateway uses the same app process.
#[test]
fn a_killed_gateway_interrupts_no_request_of_another_one() {
    let mut site = site(1, 3, &[], &[]);
    let app = site.apps();
    let load = Load::new(Tolerance::All);
    let mut random = fastrand::Rng::with_seed(7);
    let kills = scaled(50);
    load.run(&site, CLIENTS, || {
        for _ in 0..kills {
            if !load.answered(random.u64(1..50)) {
                break;
            }
            site.kill_one(Site::gateways, 2, &mut random);
        }
    });
    site.at_rest();
    assert_eq!(site.apps(), app, "no app process was replaced");
    let sorry = load.sorry.load(std::sync::atomic::Ordering::SeqCst);
    assert!(sorry <= kills * CLIENTS as u64, "{sorry}");
    site.server.stop();
}

#[test]
fn a_request_that_kills_one_child_after_another_is_quarantined() {
    let mut site = site(1, 4, &[], &[]);
    assert_eq!(site.get("/segv").status, 502);
    site.server.logged("quarantined a request");
    wait_until("the gateways refuse the request", || (site.get("/segv").status == 503).then_some(()));
    assert_eq!(site.get("/pid").status, 200);
    assert_eq!(site.apps().len(), 1);
    site.server.stop();
}

/// After six requests, the gateways have kept connections to the children.
#[test]
fn a_request_that_kills_its_child_is_executed_as_often_as_the_retries_allow() {
    for retries in [0, 1] {
        let mut site = site(1, 3, &["--retries", &retries.to_string(), "--quarantine", "0"], &[]);
        for number in 0..2 {
            assert_eq!(site.get(&format!("/die?x{number}")).status, 502);
            let count = site.executions(&format!("x{number}"));
            assert_eq!(count, retries + 1, "retries {retries}, request {number}");
            (0..6).for_each(|_| assert_eq!(site.get("/pid").status, 200));
        }
        site.server.stop();
    }
}

#[test]
fn the_number_of_children_must_fit() {
    use common::limit::InTime as _;
    let check = |options: &[&str], program: &str| {
        let bind = ["check", "--bind", "http:127.0.0.1:0", "--user", "root"];
        let output = std::process::Command::new(common::program("forkyard"))
            .args([&bind[..], options, &["--", program]].concat())
            .output_in_time()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (status, said) = check(&["--env", "PHP_FCGI_CHILDREN=2", "--app-concurrency", "4"], "php-cgi");
    assert!(status == Some(1) && said.contains("a child for each of the 4 requests"), "{status:?} {said}");
    for options in [
        &["--app-concurrency", "4"][..],
        &["--env", "PHP_FCGI_CHILDREN=4"],
        &["--env", "PHP_FCGI_CHILDREN=8", "--app-concurrency", "4"],
        &["--env", "PHP_FCGI_CHILDREN=0"],
    ] {
        let (status, said) = check(options, "php-cgi");
        assert_eq!(status, Some(0), "{options:?}: {said}");
    }
    // The limit applies to php-cgi, and not to the gateways, which have the connections.
    let (status, said) = check(&["--rlimit", "nofile=100", "--max-connections", "50"], "php-cgi");
    assert!(status == Some(0) && !said.contains("needs 114 descriptors"), "{status:?} {said}");
}

/// Sends a POST with this head, and returns the variables that php-cgi has received.
fn variables(site: &Site, target: &str, head: &str) -> BTreeMap<String, String> {
    use std::io::Write as _;
    let mut client = common::http::Client::connect(&site.server.http()).unwrap();
    write!(client.stream.get_mut(), "POST {target} HTTP/1.1\r\n{head}\r\nabc").unwrap();
    let text = client.response(false).unwrap().text();
    let lines = text.lines().filter_map(|line| line.split_once('='));
    lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn assert_variables(found: &BTreeMap<String, String>, expected: &[(&str, Option<&str>)]) {
    for (name, value) in expected {
        assert_eq!(found.get(*name).map(String::as_str), *value, "{name}: {found:?}");
    }
}

/// The variables that front controllers, WordPress, Symfony and DokuWiki read.
#[test]
fn variables_that_applications_expect() {
    let mut site = Site::php(&["--trust", "127.0.0.1"], &[]);
    std::fs::create_dir(site.path("sub")).unwrap();
    std::fs::copy(site.path("index.php"), site.path("sub/index.php")).unwrap();
    let root = site.place.text("");
    let root = root.trim_end_matches('/');
    let head = "Host: www.example.org:8080\r\nAuthorization: Basic Ym9iOnNlY3JldA==\r\n\
        Content-Type: text/x-test\r\nContent-Length: 3\r\n";
    let script = format!("{root}/index.php");
    let found = variables(&site, "/params?q=%20", head);
    assert_variables(
        &found,
        &[
            ("REQUEST_SCHEME", Some("http")),
            ("HTTPS", None),
            ("SERVER_NAME", Some("www.example.org")),
            ("SERVER_PORT", Some("8080")),
            ("SERVER_PROTOCOL", Some("HTTP/1.1")),
            ("HTTP_HOST", Some("www.example.org:8080")),
            ("DOCUMENT_ROOT", Some(root)),
            ("DOCUMENT_URI", Some("/index.php")),
            ("SCRIPT_FILENAME", Some(&script)),
            ("SCRIPT_NAME", Some("/index.php")),
            ("PHP_SELF", Some("/index.php")),
            ("PATH_INFO", None),
            ("REQUEST_URI", Some("/params?q=%20")),
            ("QUERY_STRING", Some("q=%20")),
            ("REQUEST_METHOD", Some("POST")),
            ("CONTENT_TYPE", Some("text/x-test")),
            ("CONTENT_LENGTH", Some("3")),
            ("REMOTE_ADDR", Some("127.0.0.1")),
            ("HTTP_AUTHORIZATION", Some("Basic Ym9iOnNlY3JldA==")),
            ("PHP_AUTH_USER", Some("bob")),
            ("PHP_AUTH_PW", Some("secret")),
            ("REDIRECT_STATUS", Some("200")),
            ("GATEWAY_INTERFACE", Some("CGI/1.1")),
        ],
    );
    assert!(found["REMOTE_PORT"].parse::<u16>().is_ok_and(|port| port != 0), "{found:?}");

    let (script, translated) = (format!("{root}/sub/index.php"), format!("{root}/params"));
    assert_variables(
        &variables(&site, "/sub/index.php/params", head),
        &[
            ("SCRIPT_FILENAME", Some(&script)),
            ("SCRIPT_NAME", Some("/sub/index.php")),
            ("PATH_INFO", Some("/params")),
            ("PATH_TRANSLATED", Some(&translated)),
            ("PHP_SELF", Some("/sub/index.php/params")),
            ("DOCUMENT_URI", Some("/sub/index.php/params")),
            ("REQUEST_URI", Some("/sub/index.php/params")),
        ],
    );

    let proxied = "Host: www.example.org\r\nX-Forwarded-Proto: https\r\nX-Forwarded-For: 203.0.113.9\r\n\
        Content-Length: 3\r\n";
    assert_variables(
        &variables(&site, "/params", proxied),
        &[
            ("HTTPS", Some("on")),
            ("REQUEST_SCHEME", Some("https")),
            ("SERVER_PORT", Some("443")),
            ("REMOTE_ADDR", Some("203.0.113.9")),
            ("CONTENT_TYPE", None),
        ],
    );
    site.server.stop();
}
