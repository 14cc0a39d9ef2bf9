//! Parses the address of the server, in the project's bind syntax: `PROTO:HOST:PORT`, `PROTO:unix:PATH` or `PROTO:unix:@NAME`.

use std::fmt;
use std::net::ToSocketAddrs as _;
use std::str::FromStr;

use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, UnixAddr};

use crate::error::Error;

/// The protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Fastcgi,
    Http,
}

/// A server, as given on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) protocol: Protocol,
    place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Unix { name: String, address: UnixAddr },
    Inet { host_port: String },
}

/// An address that a socket can connect to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Peer {
    Unix(UnixAddr),
    Inet { address: SockaddrStorage, family: AddressFamily },
}

impl Target {
    /// Resolves the host name. The first address is used for the whole run.
    pub(crate) fn resolve(&self) -> Result<Peer, Error> {
        let host_port = match &self.place {
            Place::Unix { address, .. } => return Ok(Peer::Unix(*address)),
            Place::Inet { host_port } => host_port,
        };
        let unresolved = |source| Error::Resolve { host: host_port.clone(), source };
        let mut found = host_port.to_socket_addrs().map_err(|error| unresolved(Some(error)))?;
        let address = found.next().ok_or_else(|| unresolved(None))?;
        let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        Ok(Peer::Inet { address: address.into(), family })
    }

    /// Returns the value of `Host` for an HTTP request.
    pub(crate) fn host(&self) -> &str {
        match &self.place {
            Place::Unix { .. } => "localhost",
            Place::Inet { host_port } => host_port,
        }
    }
}

impl Peer {
    pub(crate) fn family(&self) -> AddressFamily {
        match self {
            Self::Unix(_) => AddressFamily::Unix,
            Self::Inet { family, .. } => *family,
        }
    }

    pub(crate) fn address(&self) -> &dyn SockaddrLike {
        match self {
            Self::Unix(address) => address,
            Self::Inet { address, .. } => address,
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (protocol, rest) = match text.split_once(':') {
            Some(("fastcgi", rest)) => (Protocol::Fastcgi, rest),
            Some(("http", rest)) => (Protocol::Http, rest),
            _ => return Err("must start with fastcgi: or http:".into()),
        };
        let place = match rest.strip_prefix("unix:") {
            Some(name) => Place::unix(name)?,
            None => Place::inet(rest)?,
        };
        Ok(Self { protocol, place })
    }
}

impl Place {
    fn unix(name: &str) -> Result<Self, String> {
        let address = match name.strip_prefix('@') {
            Some("") => return Err("unix:@ needs a name".into()),
            Some(abstract_name) => UnixAddr::new_abstract(abstract_name.as_bytes()),
            None if name.is_empty() => return Err("unix: needs a path".into()),
            None => UnixAddr::new(name),
        };
        let address = address.map_err(|_| format!("{name}: too long for a socket, or contains a zero byte"))?;
        Ok(Self::Unix { name: name.into(), address })
    }

    fn inet(host_port: &str) -> Result<Self, String> {
        let (host, port) = host_port.rsplit_once(':').ok_or("the address must be HOST:PORT or unix:PATH")?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.is_empty() || (host.contains(':') && !bracketed) {
            return Err(format!("{host_port}: write HOST:PORT, and an IPv6 address as [ADDRESS]:PORT"));
        }
        match port.parse::<u16>() {
            Ok(port) if port != 0 => Ok(Self::Inet { host_port: host_port.into() }),
            _ => Err(format!("{port}: not a port to connect to")),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fastcgi => "fastcgi",
            Self::Http => "http",
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Unix { name, .. } => write!(f, "{}:unix:{name}", self.protocol),
            Place::Inet { host_port } => write!(f, "{}:{host_port}", self.protocol),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_forms_print_as_they_were_written() {
        for text in [
            "fastcgi:unix:/run/app.sock",
            "fastcgi:unix:@forkyard",
            "fastcgi:127.0.0.1:9000",
            "http:localhost:8080",
            "http:unix:run/relative.sock",
            "http:[::1]:80",
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn refused_forms() {
        for text in [
            "",
            "fastcgi",
            "scgi:unix:/a",
            "unix:/a",
            "fastcgi:unix:",
            "fastcgi:unix:@",
            "http:localhost",
            "http::80",
            "http:localhost:0",
            "http:localhost:65536",
            "http:localhost:http",
            "http:::1:80",
        ] {
            assert!(text.parse::<Target>().is_err(), "accepted: {text}");
        }
        assert!(format!("fastcgi:unix:/{}", "x".repeat(200)).parse::<Target>().is_err());
    }

    #[test]
    fn addresses() {
        let peer = |text: &str| text.parse::<Target>().unwrap().resolve().unwrap();
        assert_eq!(peer("http:127.0.0.1:80").family(), AddressFamily::Inet);
        assert_eq!(peer("http:[::1]:80").family(), AddressFamily::Inet6);
        let Peer::Unix(address) = peer("fastcgi:unix:@name") else { panic!("not a Unix address") };
        assert_eq!(address.as_abstract(), Some(b"name".as_slice()));
        let Peer::Unix(address) = peer("fastcgi:unix:/run/a") else { panic!("not a Unix address") };
        assert_eq!(address.path(), Some(std::path::Path::new("/run/a")));
    }
}
