//! A server in the background of a terminal that stops background jobs when they write to it (`stty tostop`).

#![allow(clippy::unwrap_used, reason = "a failing test reports its location")]

mod common;

use std::process::Command;

use common::{Server, http, program};
use nix::sys::signal::Signal;

/// Runs a command as a background job of a new terminal, copies the terminal's output to standard error, forwards signals, and exits with
/// the status of the command.
const TERMINAL: &str = "
import fcntl, os, pty, signal, sys, termios
ours, theirs = pty.openpty()
told, tell = os.pipe()
if os.fork() == 0:
    os.close(ours)
    os.setsid()
    fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
    modes = termios.tcgetattr(theirs)
    modes[1] &= ~termios.OPOST
    modes[3] |= termios.TOSTOP
    termios.tcsetattr(theirs, termios.TCSANOW, modes)
    for fd in (0, 1, 2):
        os.dup2(theirs, fd)
    os.close(theirs)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.execv(sys.argv[1], sys.argv[1:])
    os.write(tell, b'%d\\n' % job)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]) & 255)
os.close(theirs)
job = int(os.read(told, 20))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTTOU):
    signal.signal(number, lambda number, frame: os.kill(job, number))
try:
    while piece := os.read(ours, 65536):
        os.write(2, piece)
except OSError:
    pass
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
";

#[test]
fn a_background_job_of_a_terminal_logs_to_it_and_stops_on_request() {
    let mut command = Command::new("python3");
    command.args(["-c", TERMINAL]).arg(program("chatty"));
    command.args(["--bind", "http:127.0.0.1:0", "--workers", "2", "--access-log", "-"]);
    let mut server = Server::start_command(&mut command);
    assert_eq!(http::get(&server.http(), "/ok").unwrap().status, 200);
    server.wait_for("\"GET /ok HTTP/1.1\" 200");
    // For the master, this signal is a request from the operator.
    server.signal(Signal::SIGTTOU);
    server.wait_for("signal to remove a worker");
    server.wait_for("worker exited");
    server.stop();
    assert!(server.log().contains("signal to drain and stop"), "{}", server.log());
}
