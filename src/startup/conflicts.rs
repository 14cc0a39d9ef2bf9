//! Finds pairs of settings that name the same file, socket or port.
//!
//! The server checks this at startup before it creates anything, because the second setting would truncate, replace or
//! remove the file of the first. A reload and `check` report the same pairs. The log and the access log may share a
//! file, because both only append whole lines. Paths are compared after resolving symbolic links, `..`, hard links and
//! bind mounts.
//!
//! This module must not create or change anything.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::systemd;
use crate::config::Config;
use crate::config::address::{Address, Bind};
use crate::net::listen;
use crate::sys::file_path::leads_to;

/// Two settings that name the same place.
#[derive(Debug)]
pub(crate) struct Conflict {
    pub(crate) flags: [&'static str; 2],
    pub(crate) text: String,
}

impl Conflict {
    /// Returns all conflicts, as one message for the operator.
    pub(crate) fn join(conflicts: &[Conflict]) -> String {
        conflicts.iter().map(|conflict| conflict.text.as_str()).collect::<Vec<_>>().join("; ")
    }
}

/// The places that a setting names.
struct Claim {
    flag: &'static str,
    /// The flag with its value.
    shown: String,
    places: Vec<Place>,
}

#[derive(Debug)]
enum Place {
    File(FilePlace),
    /// A name in the abstract namespace.
    Name(String),
    Descriptor {
        number: RawFd,
        /// Device and inode, if the descriptor is a listening socket.
        socket: Option<(u64, u64)>,
    },
    /// The sockets with this name that systemd passes, or all sockets that it passes if `None`.
    Passed(Option<String>),
    Tcp {
        address: SocketAddr,
        leaves_ipv4: bool,
    },
}

#[derive(Debug)]
struct FilePlace {
    path: PathBuf,
    /// Device and inode, if the file exists.
    identity: Option<(u64, u64)>,
    /// Device and inode of the directory, if it exists.
    directory: Option<(u64, u64)>,
}

/// Returns the conflicts among all settings.
pub(crate) fn find(config: &Config) -> Vec<Conflict> {
    let claims = config.binds.iter().map(|bind| claim_of_bind(bind, &config.binds));
    conflicts_among(&claims.chain(files(config)).collect::<Vec<_>>())
}

/// Returns the conflicts among files and Unix sockets. Does not resolve host names.
pub(crate) fn find_among_files(config: &Config) -> Vec<Conflict> {
    let of_binds = config.binds.iter().filter(|bind| matches!(bind.address, Address::Path(_)));
    let of_binds = of_binds.map(|bind| claim_of_bind(bind, &config.binds));
    conflicts_among(&of_binds.chain(files(config)).collect::<Vec<_>>())
}

fn conflicts_among(claims: &[Claim]) -> Vec<Conflict> {
    let mut conflicts = Vec::new();
    for (index, second) in claims.iter().enumerate() {
        for first in &claims[..index] {
            let flags = [first.flag, second.flag];
            let common = first.places.iter().find(|place| second.places.iter().any(|other| place.overlaps(other)));
            if let Some(place) = common.filter(|_| flags != ["--log-file", "--access-log"]) {
                let what = place.describe();
                let text = format!("{} and {} {what} (change one of them)", first.shown, second.shown);
                conflicts.push(Conflict { flags, text });
            }
        }
    }
    conflicts
}

fn claim_of_bind(bind: &Bind, all: &[Bind]) -> Claim {
    let places = match &bind.address {
        Address::Tcp(address) => {
            // Resolving names takes time, so only addresses with a common port are resolved.
            let port = |text: &str| text.rsplit_once(':').map(|(_, port)| port.to_owned());
            let same_port =
                |other: &&Bind| matches!(&other.address, Address::Tcp(other) if port(other) == port(address));
            let found =
                if all.iter().filter(same_port).count() > 1 { listen::resolve(address) } else { Ok(Vec::new()) };
            let leaves_ipv4 = bind.leaves_ipv4(all);
            let tcp = |address| Place::Tcp { address, leaves_ipv4 };
            found.unwrap_or_default().into_iter().map(tcp).collect()
        }
        Address::Path(path) => vec![Place::File(FilePlace::of(path))],
        Address::Abstract(name) => vec![Place::Name(name.clone())],
        Address::Inherited(fd) => vec![Place::descriptor(*fd)],
        Address::Systemd(name) => {
            let passed = systemd::sockets(name.as_deref()).unwrap_or_default().into_iter().map(Place::descriptor);
            [Place::Passed(name.clone())].into_iter().chain(passed).collect()
        }
    };
    Claim { flag: "--bind", shown: format!("--bind {bind}"), places }
}

fn files(config: &Config) -> impl Iterator<Item = Claim> {
    let logs = &config.logs;
    let publish = config.publish.socket.as_ref().filter(|_| config.events.bytes > 0);
    let all = [
        ("--config", config.control.file.as_ref()),
        ("--control", config.control.socket.as_ref()),
        ("--events-socket", publish),
        ("--pid-file", config.privileges.pid_file.as_ref()),
        ("--cache-file", config.cache.file.as_ref()),
        ("--log-file", logs.file.as_ref()),
        ("--access-log", logs.access.as_ref().and_then(|access| access.file.as_ref())),
    ];
    all.into_iter().filter_map(|(flag, path)| {
        let path = path?;
        let places = vec![Place::File(FilePlace::of(path))];
        Some(Claim { flag, shown: format!("{flag} {}", path.display()), places })
    })
}

impl Place {
    fn descriptor(number: RawFd) -> Self {
        Self::Descriptor { number, socket: listen::identity_of(number) }
    }

    fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(one), Self::File(other)) => one.is_same(other),
            (Self::Name(one), Self::Name(other)) => one == other,
            (
                Self::Descriptor { number: one, socket: one_socket },
                Self::Descriptor { number: other, socket: other_socket },
            ) => one == other || one_socket.is_some() && one_socket == other_socket,
            (Self::Passed(one), Self::Passed(other)) => one.is_none() || other.is_none() || one == other,
            (
                &Self::Tcp { address: one, leaves_ipv4: one_leaves },
                &Self::Tcp { address: other, leaves_ipv4: other_leaves },
            ) => takes(one, one_leaves, other) || takes(other, other_leaves, one),
            (Self::File(_) | Self::Name(_) | Self::Descriptor { .. } | Self::Passed(_) | Self::Tcp { .. }, _) => false,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::File(_) => "name the same file".to_owned(),
            Self::Name(_) => "name the same socket".to_owned(),
            Self::Descriptor { .. } | Self::Passed(_) => "refer to the same socket".to_owned(),
            Self::Tcp { address, .. } => format!("overlap: both would listen on port {}", address.port()),
        }
    }
}

/// Whether a socket that listens on `ours` prevents a second socket from listening on `other`.
fn takes(ours: SocketAddr, leaves_ipv4: bool, other: SocketAddr) -> bool {
    // Port 0: the system chooses a port for each socket.
    if ours.port() != other.port() || ours.port() == 0 {
        return false;
    }
    match (ours.ip().to_canonical(), other.ip().to_canonical()) {
        (IpAddr::V6(our_ip), IpAddr::V4(_)) => our_ip.is_unspecified() && !leaves_ipv4,
        (our_ip @ IpAddr::V4(_), other_ip @ IpAddr::V4(_)) => our_ip.is_unspecified() || our_ip == other_ip,
        // Link-local addresses on different interfaces are different addresses.
        (our_ip @ IpAddr::V6(_), IpAddr::V6(_)) => our_ip.is_unspecified() || ours == other,
        (IpAddr::V4(_), IpAddr::V6(_)) => false,
    }
}

impl FilePlace {
    fn of(path: &Path) -> Self {
        let path = leads_to(path);
        let identity = |path: &Path| path.metadata().ok().map(|found| (found.dev(), found.ino()));
        Self { identity: identity(&path), directory: path.parent().and_then(identity), path }
    }

    fn is_same(&self, other: &Self) -> bool {
        let both = |one: Option<(u64, u64)>, other| one.is_some() && one == other;
        self.path == other.path
            || both(self.identity, other.identity)
            || both(self.directory, other.directory) && self.path.file_name() == other.path.file_name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[String]) -> Config {
        let arguments: Vec<std::ffi::OsString> =
            ["x"].into_iter().chain(arguments.iter().map(String::as_str)).map(Into::into).collect();
        match crate::cli::parse_linked(&arguments, &crate::cli::AppInfo::default()).unwrap() {
            crate::cli::Invocation::Serve(request) => request.config,
            other => panic!("not a request to serve: {other:?}"),
        }
    }

    #[test]
    fn addresses_overlap_as_in_the_kernel() {
        for (binds, overlap) in [
            (["http:127.0.0.1:80", "fastcgi:127.0.0.1:80"], true),
            (["http:0.0.0.0:80", "http:127.0.0.1:80"], true),
            (["http:127.0.0.1:80", "http:0.0.0.0:80"], true),
            (["http:[::]:80", "http:[::1]:80"], true),
            (["http:[::]:80", "http:[::ffff:127.0.0.1]:80"], true),
            (["http:127.0.0.1:80", "http:[::ffff:127.0.0.1]:80"], true),
            (["http:unix:@a", "fastcgi:unix:@a"], true),
            (["http:fd:3", "fastcgi:fd:3"], true),
            (["http:systemd", "fastcgi:systemd:a"], true),
            (["http:systemd:b", "fastcgi:systemd:a"], false),
            (["http:[::]:80", "http:0.0.0.0:80"], false),
            (["http:[::]:80", "http:127.0.0.1:80"], false),
            (["http:0.0.0.0:80", "http:[::1]:80"], false),
            (["http:127.0.0.1:80", "http:127.0.0.2:80"], false),
            (["http:127.0.0.1:0", "http:0.0.0.0:0"], false),
            (["http:127.0.0.1:80", "http:127.0.0.1:81"], false),
            (["http:[fe80::1%1]:80", "http:[fe80::1%2]:80"], false),
            (["http:unix:@a", "http:unix:@b"], false),
        ] {
            for binds in [binds, [binds[1], binds[0]]] {
                let found = find(&config(&binds.map(|bind| format!("--bind={bind}"))));
                assert_eq!(found.len(), usize::from(overlap), "{binds:?}: {found:?}");
            }
        }
    }

    #[test]
    fn two_descriptors_of_one_listening_socket_are_one_socket() {
        use std::os::fd::AsRawFd as _;
        let sockets = [(), ()].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let copy = sockets[0].try_clone().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let bind = |fd: std::os::fd::RawFd| format!("--bind=http:fd:{fd}");
        let conflicts = |one, other| find(&config(&[bind(one), bind(other)])).into_iter().map(|conflict| conflict.text);
        let (one, other) = (sockets[0].as_raw_fd(), copy.as_raw_fd());
        let found: Vec<String> = conflicts(one, other).collect();
        assert_eq!(
            found,
            [format!("--bind http:fd:{one} and --bind http:fd:{other} refer to the same socket (change one of them)")]
        );
        assert_eq!(conflicts(one, sockets[1].as_raw_fd()).count(), 0);
        // Descriptors other than listening sockets are not compared, because the number may have another use, for
        // example during an upgrade.
        assert_eq!(conflicts(file.as_raw_fd(), file.try_clone().unwrap().as_raw_fd()).count(), 0);
    }

    #[test]
    fn two_settings_of_one_file_conflict_under_any_of_its_names_except_the_two_logs() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir(path("real")).unwrap();
        std::os::unix::fs::symlink("real", path("link")).unwrap();
        std::os::unix::fs::symlink("real/a", path("dangling")).unwrap();
        std::fs::write(path("real/one"), "").unwrap();
        std::fs::hard_link(path("real/one"), path("real/other")).unwrap();
        let flags =
            ["--bind", "--control", "--events-socket", "--pid-file", "--cache-file", "--log-file", "--access-log"];
        let given = |flag: &str, name: &str| {
            let unix = if flag == "--bind" { "fastcgi:unix:" } else { "" };
            format!("{flag}={unix}{}", path(name).display())
        };
        for (names, same) in [
            (["real/a", "link/a"], true),
            (["real/a", "real/../real/./a"], true),
            (["real/a", "dangling"], true),
            (["real/one", "real/other"], true),
            (["none/a", "none/a"], true),
            (["real/a", "real/b"], false),
            (["real/a", "a"], false),
        ] {
            for (index, second) in flags.iter().enumerate() {
                for first in &flags[..index] {
                    let found = find(&config(&[given(first, names[0]), given(second, names[1])]));
                    let are_logs = (*first, *second) == ("--log-file", "--access-log");
                    let expected: Vec<[&str; 2]> = if same && !are_logs { vec![[first, second]] } else { Vec::new() };
                    let found: Vec<_> = found.iter().map(|conflict| conflict.flags).collect();
                    assert_eq!(found, expected, "{names:?}");
                }
            }
        }
    }
}
