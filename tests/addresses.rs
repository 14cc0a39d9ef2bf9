//! Listening addresses: both address families, wildcards, and names that have several addresses.

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::process::Command;

use common::limit::InTime as _;
use common::{Server, free_port, http, program};
use nix::sys::signal::Signal;

fn mirror(binds: &[&str]) -> Server {
    let binds = binds.iter().flat_map(|bind| ["--bind", bind]);
    Server::start_command(Command::new(program("mirror")).args(["--workers", "1"]).args(binds))
}

fn seen(address: &str) -> String {
    http::get(address, "/").unwrap_or_else(|error| panic!("{address}: {error}")).text()
}

fn has_ipv6() -> bool {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

/// Returns a command in a mount namespace in which `localhost` resolves to these addresses.
fn where_localhost_is(addresses: &[&str], name: &str) -> Command {
    assert!(nix::unistd::geteuid().is_root(), "this test mounts a file: run it as root");
    let hosts: String = addresses.iter().map(|address| format!("{address} localhost\\n")).collect();
    // The mount of the file disappears with the namespace.
    let script = format!(
        "mount -t tmpfs tmpfs /mnt && printf '{hosts}' > /mnt/hosts && mount --bind /mnt/hosts /etc/hosts && exec \"$0\" \"$@\""
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(program(name));
    command
}

#[test]
fn both_wildcards_can_be_bound_in_any_order_and_each_serves_its_address_family() {
    assert!(has_ipv6(), "this test needs IPv6 on loopback");
    let port = free_port();
    let (v4, v6) = (format!("http:0.0.0.0:{port}"), format!("http:[::]:{port}"));
    for binds in [[&v4, &v6], [&v6, &v4]] {
        let mut server = mirror(&binds.map(String::as_str));
        assert!(seen(&format!("127.0.0.1:{port}")).contains("\npeer=127.0.0.1:"));
        assert!(seen(&format!("[::1]:{port}")).contains("\npeer=[::1]:"));
        server.stop();
    }
}

#[test]
fn the_ipv6_wildcard_alone_serves_ipv4_clients_under_their_ipv4_addresses() {
    assert!(has_ipv6(), "this test needs IPv6 on loopback");
    let port = free_port();
    let mut server = mirror(&[&format!("http:[::]:{port}")]);
    assert!(seen(&format!("[::1]:{port}")).contains("\npeer=[::1]:"));
    assert!(seen(&format!("127.0.0.1:{port}")).contains("\npeer=127.0.0.1:"));
    server.stop();
}

#[test]
fn a_host_name_binds_all_its_addresses_on_one_port_even_after_an_upgrade() {
    assert!(has_ipv6(), "this test needs IPv6 on loopback");
    let mut command = where_localhost_is(&["::1", "127.0.0.1", "192.0.2.1"], "mirror");
    let mut server = Server::start_command(command.args(["--workers", "1", "--bind", "http:localhost:0"]));
    let addresses: Vec<SocketAddr> =
        server.binds.iter().map(|bind| bind.strip_prefix("http://").unwrap().parse().unwrap()).collect();
    assert_eq!(addresses.len(), 2, "an address that this machine does not have is skipped: {addresses:?}");
    assert_eq!(addresses[0].port(), addresses[1].port());
    for is_upgraded in [false, true] {
        if is_upgraded {
            server.signal(Signal::SIGUSR2);
            server.wait_for("upgraded version=");
            server.wait_for("reload done");
        }
        for address in &addresses {
            assert!(
                seen(&address.to_string())
                    .contains(&format!("\npeer={}", if address.is_ipv4() { "127." } else { "[::1]" }))
            );
        }
    }
    server.stop();

    // Startup fails if one address of a name cannot be bound.
    let taken = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut command = where_localhost_is(&["127.0.0.1", "::1"], "mirror");
    let output = command.args(["--bind", &format!("http:localhost:{port}")]).output_in_time().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains(&format!("port {port} is in use")), "{said}");
}

#[test]
fn a_program_that_accepts_connections_itself_gets_only_the_first_address_of_a_name() {
    assert!(has_ipv6(), "this test needs IPv6 on loopback");
    let mut command = where_localhost_is(&["127.0.0.1", "::1"], "forkyard");
    command.args([
        "run",
        "--direct",
        "--bind",
        "fastcgi:localhost:0",
        "--workers",
        "1",
        "--settle",
        "0",
        "--",
        "sleep",
        "1000",
    ]);
    let mut server = Server::launch(&mut command);
    server.wait_for("did not bind an address: a program that accepts connections itself has one socket");
    server.wait_for("ready in ");
    assert_eq!(server.binds.len(), 1);
}

#[test]
fn a_host_without_ipv4_serves_over_ipv6() {
    assert!(nix::unistd::geteuid().is_root(), "this test creates a network namespace: run it as root");
    let script = "ip link set lo up && ip -4 addr flush dev lo && exec \"$0\" \"$@\"";
    let command = |binds: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", script]).arg(program("hello")).args(["--workers", "1"]).args(binds);
        command
    };
    for bind in ["http:[::1]:0", "http:[::]:0"] {
        let mut server = Server::start_command(&mut command(&["--bind", bind]));
        let address = server.http().replace("[::]", "[::1]");
        let pid = server.pid();
        let answer = std::thread::spawn(move || {
            let network = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
            nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            http::get(&address, "/").unwrap().status
        });
        assert_eq!(answer.join().unwrap(), 200);
        server.stop();
    }
    // The default address is an IPv4 address. The error names a usable address.
    let output = command(&[]).output_in_time().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("without IPv4: [::1]"), "{said}");
}
