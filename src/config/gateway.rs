//! The settings of gateways, which forward requests to app processes (`forkyard run` without `--direct`).
//!
//! One command line describes two pools of processes: the gateways, which serve clients, and the app processes, which
//! run COMMAND. `--workers` and the other settings of processes apply to the app processes. [`Config::of_gateways`]
//! derives the settings of the gateways.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::failures::Failures;
use super::files::FilesConfig;
use super::privileges::PrivilegesConfig;
use super::sse::SseRoutes;
use super::{Config, Range, Scaling, Share};

/// Maximum number of gateways.
const MAX_GATEWAYS: u32 = 64;
/// Maximum number of requests that one app process serves at a time.
const MAX_CONCURRENCY: u32 = 1024;
/// Number of gateways that `auto` selects at most. More are rarely needed, because a gateway does little work for each
/// request.
const MAX_AUTO_GATEWAYS: usize = 4;

/// The settings of the gateways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GatewayConfig {
    pub(crate) gateways: GatewayCount,
    pub(crate) backend: Backend,
    /// Number of requests that one app process serves at a time.
    pub(crate) concurrency: u32,
    /// The children of each app process, if the program is php-cgi with children ([`Config::use_php_children`]).
    pub(crate) php: Option<PhpChildren>,
    /// Whether the master counts the requests of app processes (`--max-requests`). Set by [`Config::of_gateways`].
    pub(crate) counts_requests: bool,
    /// Number of further app processes that a request is sent to if the app process that serves it dies.
    pub(crate) retries: u32,
    /// How long a request may wait for an app process; zero means no limit.
    pub(crate) queue_timeout: Duration,
    /// How long an app process may take to begin its response; zero means no limit.
    pub(crate) request_timeout: Duration,
    /// Memory per gateway for bodies of requests and responses; the rest is in temporary files.
    pub(crate) buffer_memory: u64,
    /// Space per gateway for temporary files.
    pub(crate) buffer_files: u64,
    pub(crate) temp_dir: PathBuf,
    pub(crate) scripts: Scripts,
    pub(crate) files: FilesConfig,
    /// The event streams that the gateways serve.
    pub(crate) sse: SseRoutes,
}

/// The protocol between gateways and app processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Backend {
    #[default]
    Fastcgi,
    Http,
    Scgi,
    /// Each process is Forkyard's CGI runner, which starts the program once for each request. The gateways reach it over
    /// FastCGI.
    Cgi,
}

impl Backend {
    /// Number of requests that an app process serves at a time unless `--app-concurrency` is given. Most HTTP servers
    /// have threads or an event loop; other programs usually have neither.
    pub(crate) fn default_concurrency(self) -> u32 {
        match self {
            Self::Fastcgi | Self::Scgi | Self::Cgi => 1,
            Self::Http => 64,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fastcgi => "fastcgi",
            Self::Http => "http",
            Self::Scgi => "scgi",
            Self::Cgi => "cgi",
        })
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fastcgi" => Ok(Self::Fastcgi),
            "http" => Ok(Self::Http),
            "scgi" => Ok(Self::Scgi),
            "cgi" => Ok(Self::Cgi),
            _ => Err(format!("'{text}' is not a protocol of app processes (expected fastcgi, http, scgi or cgi)")),
        }
    }
}

/// How an app process gets the socket on which it accepts the gateways' connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ListenMethod {
    /// The process inherits a listening socket: as standard input with FastCGI, as descriptor 3 with HTTP, as both with
    /// SCGI.
    #[default]
    Inherited,
    /// The process listens on a port of 127.0.0.1, which replaces `{port}` in its command.
    Port,
    /// The process listens on a Unix socket, whose path replaces `{socket}` in its command.
    Path,
}

impl ListenMethod {
    /// Returns the method that a command asks for.
    ///
    /// # Errors
    /// Returns a message for the operator if the command asks for more than one, or if the backend has only one.
    pub(crate) fn of_command(backend: Backend, arguments: &[OsString]) -> Result<Self, String> {
        let has = |name: &str| arguments.iter().any(|argument| argument.to_string_lossy().contains(name));
        let named = [("{fd}", Self::Inherited), ("{port}", Self::Port), ("{socket}", Self::Path)];
        let mut named = named.into_iter().filter(|(name, _)| has(name));
        match (named.next(), named.next()) {
            (None, _) => Ok(Self::Inherited),
            (Some((name, _)), _) if backend == Backend::Fastcgi => Err(format!(
                "COMMAND contains {name}, which is for --backend http and scgi: FastCGI programs accept from descriptor 0"
            )),
            (Some((name, _)), _) if backend == Backend::Cgi => Err(format!(
                "COMMAND contains {name}, which is for --backend http and scgi: CGI programs do not listen"
            )),
            (Some((_, method)), None) => Ok(method),
            (Some((first, _)), Some((second, _))) => {
                Err(format!("COMMAND contains both {first} and {second}: choose one"))
            }
        }
    }
}

/// How a request is mapped to a script, for programs that run scripts (php-cgi).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scripts {
    /// The directory of the scripts. Without it, every request is for the program itself.
    pub(crate) root: Option<PathBuf>,
    /// The script below `root` for requests that name no script.
    pub(crate) index: Option<String>,
}

/// The number of gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GatewayCount(pub(crate) u32);

impl GatewayConfig {
    /// Checks the directories.
    ///
    /// # Errors
    /// Returns a message for the operator for each directory that cannot be used.
    pub(crate) fn examine(&self) -> Vec<String> {
        let root = self.scripts.root.as_deref().map(|root| ("--root", root));
        let directories =
            root.into_iter().chain([("--temp-dir", self.temp_dir.as_path())]).chain(self.files.directories());
        let examine = |(flag, path): (&str, &Path)| match path.metadata() {
            Ok(found) if found.is_dir() => None,
            Ok(_) => Some(format!("{flag}: {} is not a directory", path.display())),
            Err(error) => Some(format!("{flag}: {}: {error}", path.display())),
        };
        directories.filter_map(examine).collect()
    }
}

/// The children that each php-cgi forks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PhpChildren {
    /// Number of children; `None` if `--env` sets it.
    pub(crate) number: Option<u32>,
    /// Number of requests after which php-cgi replaces a child; `None` for its own default.
    pub(crate) max_requests: Option<u64>,
}

/// The settings that determine whether php-cgi has children.
#[derive(Debug)]
pub(crate) struct PhpSettings<'a> {
    pub(crate) program: &'a OsStr,
    /// The value of `--env PHP_FCGI_CHILDREN`.
    pub(crate) children: Option<&'a str>,
    /// The value of `--app-concurrency`.
    pub(crate) concurrency: Option<u32>,
}

impl GatewayConfig {
    /// Variable for the number of children that php-cgi forks.
    pub(crate) const PHP_CHILDREN: &str = "PHP_FCGI_CHILDREN";
    /// Variable for the number of requests that a child of php-cgi serves.
    pub(crate) const PHP_MAX_REQUESTS: &str = "PHP_FCGI_MAX_REQUESTS";
}

impl Config {
    /// Determines whether each app process is a php-cgi with children, which share its opcache and APCu. By default, there is
    /// one app process, with as many children as there would be app processes otherwise. `--max-requests` applies to children.
    ///
    /// php-cgi has one child for each request that it serves at a time, and one more for each gateway: the request of a
    /// gateway that dies continues to occupy its child.
    ///
    /// # Errors
    /// Returns a message for the operator if there are fewer children than requests.
    pub(crate) fn use_php_children(&mut self, settings: &PhpSettings<'_>) -> Result<(), String> {
        let Some(gateway) = &mut self.gateway else { return Ok(()) };
        let name = Path::new(settings.program).file_name().unwrap_or_default().as_encoded_bytes();
        let given = settings.children.and_then(|value| value.parse::<u32>().ok());
        if gateway.backend != Backend::Fastcgi || !name.starts_with(b"php-cgi") || given == Some(0) {
            return Ok(());
        }
        let is_default = settings.concurrency.or(given).is_none();
        gateway.concurrency = settings.concurrency.or(given).unwrap_or(self.workers.max).clamp(1, MAX_CONCURRENCY);
        if given.is_some_and(|children| children < gateway.concurrency) {
            return Err(format!(
                "--env {}={}: php-cgi must have a child for each of the {} requests of --app-concurrency (remove the \
                 variable, or choose a smaller --app-concurrency)",
                GatewayConfig::PHP_CHILDREN,
                given.unwrap_or_default(),
                gateway.concurrency
            ));
        }
        if given.is_none() && gateway.concurrency == 1 {
            return Ok(());
        }
        if is_default {
            self.workers = Range { min: 1, max: 1 };
        }
        let number = if given.is_some() { None } else { Some(gateway.concurrency + gateway.gateways.0) };
        gateway.php = Some(PhpChildren { number, max_requests: self.scaling.max_requests.take().map(|max| max.limit) });
        Ok(())
    }
}

/// The space in shared memory for requests in app processes.
impl GatewayConfig {
    /// Returns the number of requests for which each app process has space. A reload can change `--app-concurrency` up to this
    /// number.
    pub(crate) fn units(&self) -> u32 {
        if self.concurrency == 1 { 1 } else { self.concurrency * 2 }
    }

    /// Whether a server that has reserved this space can use these settings. Processes that serve one request at a time are used
    /// differently from others, which cannot change.
    pub(crate) fn fits(&self, units: u32) -> bool {
        self.concurrency <= units && (self.concurrency == 1) == (units == 1)
    }
}

impl fmt::Display for GatewayCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for GatewayCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            return Ok(Self(u32::try_from(processors.clamp(1, MAX_AUTO_GATEWAYS)).unwrap_or(1)));
        }
        let number = text.parse().ok().filter(|number| (1..=MAX_GATEWAYS).contains(number));
        number.map(Self).ok_or(format!("'{text}' is not a number of gateways (expected 1 to {MAX_GATEWAYS}, or auto)"))
    }
}

impl Config {
    /// Returns the protocol between gateways and app processes.
    pub(crate) fn backend(&self) -> Backend {
        self.gateway.as_ref().map(|gateway| gateway.backend).unwrap_or_default()
    }

    /// Returns the settings of the gateways, or the same settings if there are no gateways.
    ///
    /// A gateway runs no code of the application. It therefore changes its user, as an app process does, but keeps its
    /// root directory, its resource limits and its priority, and it is not replaced because of its age, its size or the
    /// number of its requests.
    pub(crate) fn of_gateways(&self) -> Self {
        let Some(gateway) = &self.gateway else { return self.clone() };
        let GatewayCount(number) = gateway.gateways;
        let scaling = Scaling {
            max_unavailable: Share::Number(1),
            max_requests: None,
            max_memory: None,
            max_age: None,
            health_path: None,
            ..self.scaling.clone()
        };
        let privileges = PrivilegesConfig {
            chroot: None,
            chdir: None,
            limits: Vec::new(),
            nice: None,
            affinity: None,
            ..self.privileges.clone()
        };
        // A gateway measures the time that an app process takes, and not the time in which a client sends the body.
        let failures = Failures { request_timeout: Duration::ZERO, ..self.failures };
        let counts_requests = self.scaling.max_requests.is_some();
        Self {
            workers: Range { min: number, max: number },
            scaling,
            privileges,
            failures,
            program: None,
            gateway: Some(GatewayConfig { counts_requests, ..gateway.clone() }),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_selects_how_a_process_listens() {
        let method = |backend, command: &[&str]| {
            ListenMethod::of_command(backend, &command.iter().map(OsString::from).collect::<Vec<_>>())
        };
        for (command, expected) in [
            (&["app.js"][..], ListenMethod::Inherited),
            (&["--fd", "{fd}"], ListenMethod::Inherited),
            (&["--bind=127.0.0.1:{port}"], ListenMethod::Port),
            (&["--uds", "{socket}"], ListenMethod::Path),
        ] {
            assert_eq!(method(Backend::Http, command), Ok(expected), "{command:?}");
            assert_eq!(method(Backend::Scgi, command), Ok(expected), "{command:?}");
        }
        assert!(method(Backend::Http, &["{port}", "{socket}"]).unwrap_err().contains("{port} and {socket}"));
        assert!(method(Backend::Fastcgi, &["{port}"]).unwrap_err().contains("--backend http"));
        assert!(method(Backend::Cgi, &["{fd}"]).unwrap_err().contains("do not listen"));
    }

    #[test]
    fn numbers_of_gateways_are_read() {
        assert_eq!("3".parse(), Ok(GatewayCount(3)));
        assert!((1..=4).contains(&"auto".parse::<GatewayCount>().unwrap().0));
        for text in ["", "0", "65", "-1", "many"] {
            assert!(text.parse::<GatewayCount>().unwrap_err().contains("expected 1 to 64, or auto"), "{text}");
        }
    }
}
