//! Starts real web servers in front of Forkyard. The part of the configuration that concerns the application is extracted from
//! docs/web-servers.md, so that the tests check the documented configuration. For each web server, a file in this directory adds the
//! settings that a server in a temporary directory needs.
//!
//! Each web server runs in the foreground, listens on a free loopback port, and writes only to its directory.

#![allow(dead_code, reason = "each test binary uses only a part of this module")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code outside of test functions")]

mod apache;
mod caddy;
mod haproxy;
mod lighttpd;
mod nginx;

use std::fmt;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::common::{Helper, Server, free_port, listens_on, program, wait_until};

const DOCUMENT: &str = include_str!("../../../docs/web-servers.md");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WebServer {
    Apache,
    Caddy,
    Haproxy,
    Lighttpd,
    Nginx,
}

impl WebServer {
    /// Returns the name that the document's code blocks and the seed files use.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Apache => "apache",
            Self::Caddy => "caddy",
            Self::Haproxy => "haproxy",
            Self::Lighttpd => "lighttpd",
            Self::Nginx => "nginx",
        }
    }
}

/// How the application is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// The web server connects to the application.
    FastCgi,
    /// The web server connects to the application and keeps the connection open.
    FastCgiKept,
    /// The web server starts the application with a listening socket as standard input.
    FastCgiStarted,
    Http,
    Scgi,
    /// The web server starts the application for each request.
    Cgi,
}

/// A web server with one of the configurations in the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Front {
    pub(crate) server: WebServer,
    pub(crate) link: Link,
    /// Name of the configuration. Its block in the document begins with the name of the web server and this name.
    pub(crate) name: &'static str,
}

impl fmt::Display for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.server.name(), self.name)
    }
}

const fn front(server: WebServer, link: Link, name: &'static str) -> Front {
    Front { server, link, name }
}

pub(crate) const NGINX: Front = front(WebServer::Nginx, Link::FastCgi, "fastcgi");
pub(crate) const NGINX_KEPT: Front = front(WebServer::Nginx, Link::FastCgiKept, "fastcgi-kept");
pub(crate) const NGINX_HTTP: Front = front(WebServer::Nginx, Link::Http, "http");
pub(crate) const NGINX_SCGI: Front = front(WebServer::Nginx, Link::Scgi, "scgi");
pub(crate) const LIGHTTPD: Front = front(WebServer::Lighttpd, Link::FastCgi, "fastcgi");
pub(crate) const LIGHTTPD_AUTHORIZER: Front = front(WebServer::Lighttpd, Link::FastCgi, "fastcgi-authorizer");
pub(crate) const LIGHTTPD_STARTED: Front = front(WebServer::Lighttpd, Link::FastCgiStarted, "fastcgi-started");
pub(crate) const LIGHTTPD_HTTP: Front = front(WebServer::Lighttpd, Link::Http, "http");
pub(crate) const LIGHTTPD_SCGI: Front = front(WebServer::Lighttpd, Link::Scgi, "scgi");
pub(crate) const LIGHTTPD_EVENTS: Front = front(WebServer::Lighttpd, Link::FastCgi, "fastcgi-events");
pub(crate) const LIGHTTPD_HTTP_EVENTS: Front = front(WebServer::Lighttpd, Link::Http, "http-events");
pub(crate) const LIGHTTPD_SCGI_EVENTS: Front = front(WebServer::Lighttpd, Link::Scgi, "scgi-events");
pub(crate) const LIGHTTPD_CGI: Front = front(WebServer::Lighttpd, Link::Cgi, "cgi");
pub(crate) const APACHE: Front = front(WebServer::Apache, Link::FastCgi, "fastcgi");
pub(crate) const APACHE_KEPT: Front = front(WebServer::Apache, Link::FastCgiKept, "fastcgi-kept");
pub(crate) const APACHE_EVENTS: Front = front(WebServer::Apache, Link::FastCgi, "fastcgi-events");
pub(crate) const APACHE_FCGID: Front = front(WebServer::Apache, Link::FastCgiStarted, "fcgid");
pub(crate) const APACHE_HTTP: Front = front(WebServer::Apache, Link::Http, "http");
pub(crate) const APACHE_SCGI: Front = front(WebServer::Apache, Link::Scgi, "scgi");
pub(crate) const APACHE_CGI: Front = front(WebServer::Apache, Link::Cgi, "cgi");
pub(crate) const HAPROXY: Front = front(WebServer::Haproxy, Link::FastCgiKept, "fastcgi");
pub(crate) const HAPROXY_MULTIPLEXED: Front = front(WebServer::Haproxy, Link::FastCgiKept, "fastcgi-multiplexed");
pub(crate) const HAPROXY_EVENTS: Front = front(WebServer::Haproxy, Link::FastCgiKept, "fastcgi-events");
pub(crate) const HAPROXY_HTTP: Front = front(WebServer::Haproxy, Link::Http, "http");
pub(crate) const NGINX_PHP: Front = front(WebServer::Nginx, Link::FastCgi, "php");
pub(crate) const LIGHTTPD_PHP: Front = front(WebServer::Lighttpd, Link::FastCgi, "php");
pub(crate) const APACHE_PHP: Front = front(WebServer::Apache, Link::FastCgi, "php");
pub(crate) const CADDY: Front = front(WebServer::Caddy, Link::FastCgi, "fastcgi");
pub(crate) const CADDY_HTTP: Front = front(WebServer::Caddy, Link::Http, "http");

/// The paths and addresses that a site's configuration needs.
pub(crate) struct Place<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) port: u16,
    /// The snippet from the document, with the addresses and paths of this site.
    pub(crate) snippet: String,
}

/// A running web server and, unless the web server itself has started the application, the application behind it.
pub(crate) struct Site {
    front: Helper,
    pub(crate) application: Option<Server>,
    /// `HOST:PORT` for clients.
    pub(crate) address: String,
    directory: TempDir,
}

impl Site {
    /// Starts the example `application` behind the web server.
    pub(crate) fn start(front: Front, application: &str) -> Self {
        let directory = shared_directory();
        let socket = directory.path().join("app.sock");
        let bind = match front.link {
            Link::FastCgi | Link::FastCgiKept => Some(format!("fastcgi:unix:{}", socket.display())),
            Link::Http => Some("http:127.0.0.1:0".to_owned()),
            Link::Scgi if front.server == WebServer::Apache => Some("scgi:127.0.0.1:0".to_owned()),
            Link::Scgi => Some(format!("scgi:unix:{}", socket.display())),
            Link::FastCgiStarted | Link::Cgi => None,
        };
        let server =
            bind.map(|bind| Server::start(application, &["--workers", "2", "--socket-mode", "666", "--bind", &bind]));
        let backend = match (&server, front.link) {
            (Some(server), Link::Http) => server.http(),
            (Some(server), Link::Scgi) if front.server == WebServer::Apache => {
                server.binds[0].strip_prefix("scgi:").expect("the address is an SCGI address").to_owned()
            }
            (Some(_), _) => socket.display().to_string(),
            (None, _) => {
                // The web server's user may not have permission to read the build directory.
                let copy = directory.path().join("app");
                fs::copy(program(application), &copy).expect("the program can be copied");
                copy.display().to_string()
            }
        };
        let (helper, address) = start(front, directory.path(), &backend);
        Self { front: helper, application: server, address, directory }
    }

    /// Starts the web server in front of the server that listens on `backend`. This may be a socket in `directory`.
    pub(crate) fn before(front: Front, directory: TempDir, backend: &str) -> Self {
        let (helper, address) = start(front, directory.path(), backend);
        Self { front: helper, application: None, address, directory }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn application(&mut self) -> &mut Server {
        self.application.as_mut().expect("the test has started the application")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["front.log", "error.log"] {
                let log = fs::read_to_string(self.directory.path().join(name)).unwrap_or_default();
                eprintln!("--- {name} of the web server (pid {}):\n{log}", self.front.0.id());
            }
        }
    }
}

/// Creates a temporary directory that the web server's user can enter.
pub(crate) fn shared_directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    directory
}

fn start(front: Front, directory: &Path, backend: &str) -> (Helper, String) {
    start_with(front.server, directory, |port| snippet(front, directory, port, backend))
}

/// Starts a web server with a configuration that is not in the document. `snippet` returns the configuration for a port. Returns the server
/// and its address.
pub(crate) fn start_with(server: WebServer, directory: &Path, snippet: impl Fn(u16) -> String) -> (Helper, String) {
    // Another process may bind the port after `free_port` has returned. The web server then exits, and a different port is tried. The port
    // alone does not show that the web server is up, because the other process may accept connections.
    for _ in 0..5 {
        let port = free_port();
        let place = Place { directory, port, snippet: snippet(port) };
        let mut helper = Helper::start(&mut command(server, &place));
        let address = format!("127.0.0.1:{port}");
        let up = wait_until("the web server listens, or has exited", || {
            let ended = helper.0.try_wait().expect("the web server is a child of the test").is_some();
            (ended || listens_on(helper.0.id().cast_signed(), port)).then_some(!ended)
        });
        if up {
            return (helper, address);
        }
    }
    let logs = ["front.log", "error.log"].map(|name| fs::read_to_string(directory.join(name)).unwrap_or_default());
    panic!("{} does not start: {}", server.name(), logs.concat());
}

fn command(server: WebServer, place: &Place<'_>) -> Command {
    let mut command = match server {
        WebServer::Apache => apache::command(place),
        WebServer::Caddy => caddy::command(place),
        WebServer::Haproxy => haproxy::command(place),
        WebServer::Lighttpd => lighttpd::command(place),
        WebServer::Nginx => nginx::command(place),
    };
    let log = File::create(place.directory.join("front.log")).unwrap();
    command.current_dir("/srv").stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command
}

/// Writes the configuration file, and returns its path.
fn configuration(place: &Place<'_>, text: &str) -> PathBuf {
    let path = place.directory.join("front.conf");
    fs::write(&path, text).unwrap();
    path
}

/// Returns the configuration for `front` from the document, with the addresses and paths replaced.
fn snippet(front: Front, directory: &Path, port: u16, backend: &str) -> String {
    let mut text = block(front).to_owned();
    let socket = directory.join("app.sock").display().to_string();
    let listens = format!("127.0.0.1:{port}");
    let port = format!(":{port} {{");
    let application: &[(&str, &str)] = match front.link {
        Link::Scgi if front.server == WebServer::Apache => &[("127.0.0.1:4000", backend)],
        Link::FastCgi if [LIGHTTPD_AUTHORIZER, NGINX_PHP, APACHE_PHP].contains(&front) => {
            &[("/run/app.sock", backend), ("/var/www", directory.to_str().expect("the path is UTF-8"))]
        }
        Link::FastCgi | Link::FastCgiKept | Link::Scgi => &[("/run/app.sock", backend)],
        Link::Cgi if front.server == WebServer::Lighttpd => &[("/usr/local/bin/app", backend)],
        Link::FastCgiStarted if front.server == WebServer::Lighttpd => {
            &[("/run/app.sock", &socket), ("/usr/local/bin/app", backend)]
        }
        Link::FastCgiStarted | Link::Cgi => {
            &[("/usr/local/bin/app", backend), ("/usr/local/bin", directory.to_str().expect("the path is UTF-8"))]
        }
        Link::Http if front.server == WebServer::Lighttpd => {
            &[("8080", backend.rsplit_once(':').expect("the address has a port").1)]
        }
        Link::Http => &[("127.0.0.1:8080", backend)],
    };
    let listen: &[(&str, &str)] = match front.server {
        WebServer::Nginx => &[("listen 80;", &format!("listen {listens};"))],
        WebServer::Haproxy => &[("bind :80", &format!("bind {listens}"))],
        WebServer::Caddy => &[(":80 {", &port)],
        WebServer::Apache | WebServer::Lighttpd => &[],
    };
    for (from, to) in listen.iter().chain(application) {
        assert!(text.contains(from), "docs/web-servers.md: no {from:?} in the block of {front}");
        text = text.replace(from, to);
    }
    text
}

fn block(front: Front) -> &'static str {
    let opening = format!("\n```{} {}\n", front.server.name(), front.name);
    let from = DOCUMENT.find(&opening).unwrap_or_else(|| panic!("docs/web-servers.md has no block {opening:?}"));
    let rest = &DOCUMENT[from + opening.len()..];
    let end = rest.find("\n```").expect("the block has an end");
    &rest[..=end]
}

/// Returns a command for a daemon, with an empty environment. Daemons are installed in directories that are not in every user's PATH.
fn daemon(name: &str) -> Command {
    const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let found = PATH.split(':').map(|directory| Path::new(directory).join(name)).find(|path| path.exists());
    let mut command =
        Command::new(found.unwrap_or_else(|| panic!("{name} is not installed (scripts/test installs it)")));
    command.env_clear().env("PATH", PATH);
    command
}

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
