//! Starts `forkyard run`, in its own directory, with real programs: php-cgi with a script, and a C program that uses libfcgi.

use std::io;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use super::fastcgi::{self, PARAMS, Response, STDIN, begin, pair, record};
use super::limit::InTime as _;
use super::{Server, program};

const HELLO_C: &str = include_str!("../programs/hello.c");
const PAGES_PHP: &str = include_str!("../programs/pages.php");

/// A directory with the socket, and a client for it.
pub struct Place {
    directory: TempDir,
    pub address: String,
}

impl Place {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("fastcgi:unix:{}", directory.path().join("app.sock").display());
        Self { directory, address }
    }

    /// Like [`Place::new`], with a loopback port instead of the Unix socket.
    pub fn with_port() -> Self {
        Self { address: format!("fastcgi:127.0.0.1:{}", super::free_port()), ..Self::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Creates an executable script.
    pub fn script(&self, name: &str, text: &str) -> String {
        // The script is first written under a different name, because a file that is open for writing cannot be executed.
        let (path, new) = (self.path(name), self.path(&format!("{name}.new")));
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(&new, &path).unwrap();
        path.to_string_lossy().into_owned()
    }

    pub fn socket(&self) -> PathBuf {
        self.path("app.sock")
    }

    /// Returns the command `forkyard run` with two processes of `command`.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut forkyard = Command::new(program("forkyard"));
        forkyard
            .args(["run", "--direct", "--bind", &self.address, "--workers", "2"])
            .args(options)
            .arg("--")
            .args(command);
        forkyard
    }

    /// Sends one request on a new connection.
    pub fn ask(&self, target: &str, body: &[u8]) -> io::Result<Response> {
        let (script, query) = target.split_once('?').unwrap_or((target, ""));
        let length = body.len().to_string();
        let file = self.path(script.trim_start_matches('/'));
        let params = [
            ("REQUEST_METHOD", if body.is_empty() { "GET" } else { "POST" }),
            ("SCRIPT_FILENAME", &file.to_string_lossy()),
            ("SCRIPT_NAME", script),
            ("QUERY_STRING", query),
            ("CONTENT_TYPE", "application/octet-stream"),
            ("CONTENT_LENGTH", &length),
            ("REQUEST_URI", target),
            ("SERVER_PROTOCOL", "HTTP/1.1"),
        ];
        let params: Vec<u8> = params.iter().flat_map(|(name, value)| pair(name, value)).collect();
        let mut records = vec![begin(1, 1, false), record(PARAMS, 1, &params, 0), record(PARAMS, 1, b"", 0)];
        records.extend(body.chunks(32 << 10).map(|piece| record(STDIN, 1, piece, 0)));
        records.push(record(STDIN, 1, b"", 0));
        let mut client = fastcgi::Client::connect(&self.address)?;
        client.send(&records)?;
        let response = client.response(1)?;
        if response.protocol_status == 0 { Ok(response) } else { Err(io::Error::other(format!("{response:?}"))) }
    }

    /// Returns the body of the response. Panics if the request fails.
    pub fn text(&self, target: &str) -> String {
        let response = self.ask(target, b"").unwrap_or_else(|error| panic!("{target}: {error}"));
        String::from_utf8(response.body().to_vec()).unwrap()
    }

    /// Starts two processes of php-cgi, with the script `/pages.php`.
    pub fn start_php(&self, options: &[&str], variables: &[(&str, &str)]) -> Server {
        std::fs::write(self.path("pages.php"), PAGES_PHP).unwrap();
        // `-n` ignores the machine's php.ini. Errors are logged to standard error, and not sent to the web server.
        let php = ["php-cgi", "-n", "-d", "log_errors=1", "-d", "fastcgi.logging=0"];
        Server::start_command(self.run(options, &php).envs(variables.iter().copied()))
    }

    /// Starts two processes of the C program.
    pub fn start_hello(&self, options: &[&str]) -> Server {
        let hello = self.compile_hello();
        Server::start_command(&mut self.run(options, &[&hello.to_string_lossy()]))
    }

    pub fn compile_hello(&self) -> PathBuf {
        self.compile("hello", HELLO_C).into()
    }

    /// Compiles a C program that uses libfcgi. Returns the path of the program.
    pub fn compile(&self, name: &str, source: &str) -> String {
        let (file, program) = (self.path(&format!("{name}.c")), self.path(name));
        std::fs::write(&file, source).unwrap();
        let mut compiler = Command::new("gcc");
        compiler.args(["-std=c11", "-Wall", "-O1", "-o"]).arg(&program).arg(&file).arg("-lfcgi");
        let output = compiler.output_in_time().expect("gcc is installed (scripts/test installs it)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        program.to_string_lossy().into_owned()
    }
}

/// Returns the value of `name` in lines of the form `NAME=VALUE`.
pub fn value<'a>(lines: &'a str, name: &str) -> Option<&'a str> {
    lines.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}
