//! `--bind PROTO:ADDR`: parsing and formatting, without I/O.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

/// The protocol of a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// FastCGI 1.0, behind a web server.
    FastCgi,
    /// SCGI, behind a web server.
    Scgi,
    /// HTTP/1.1, and HTTP/2 by prior knowledge.
    Http,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FastCgi => "fastcgi",
            Self::Scgi => "scgi",
            Self::Http => "http",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// `HOST:PORT`; with port 0, the system chooses the port.
    Tcp(String),
    /// `unix:PATH`.
    Path(PathBuf),
    /// `unix:@NAME`, in Linux's abstract namespace.
    Abstract(String),
    /// `fd:N`, a listening socket that was inherited under this number.
    Inherited(RawFd),
    /// `systemd[:NAME]`, all sockets that systemd passed, or those with this name.
    Systemd(Option<String>),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Path(path) => write!(f, "unix:{}", path.display()),
            Self::Abstract(name) => write!(f, "unix:@{name}"),
            Self::Inherited(fd) => write!(f, "fd:{fd}"),
            Self::Systemd(None) => f.write_str("systemd"),
            Self::Systemd(Some(name)) => write!(f, "systemd:{name}"),
        }
    }
}

/// One `--bind`: a protocol and an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bind {
    pub(crate) protocol: Protocol,
    pub(crate) address: Address,
}

impl Address {
    /// Whether the address can stand for several sockets: those that systemd passes, or one for each address of a host
    /// name.
    pub(crate) fn may_be_several(&self) -> bool {
        match self {
            Self::Tcp(address) => address.parse::<SocketAddr>().is_err(),
            Self::Systemd(_) => true,
            Self::Path(_) | Self::Abstract(_) | Self::Inherited(_) => false,
        }
    }
}

impl Bind {
    /// Whether the socket must accept IPv6 connections only, given all addresses that are bound. A socket on `[::]`
    /// accepts IPv4 connections too, unless an IPv4 address with the same port is bound.
    pub(crate) fn leaves_ipv4(&self, all: &[Bind]) -> bool {
        let literal = |bind: &Bind| match &bind.address {
            Address::Tcp(address) => address.parse::<SocketAddr>().ok(),
            _ => None,
        };
        let Some(SocketAddr::V6(ours)) = literal(self).filter(|ours| ours.ip().is_unspecified()) else { return false };
        all.iter().filter_map(literal).any(|other| other.is_ipv4() && other.port() == ours.port())
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.protocol, self.address)
    }
}

impl FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "expected PROTO:ADDR, as in http:127.0.0.1:8080, fastcgi:unix:/run/app.sock or fastcgi:fd:3";
        let meant = |text: Option<String>| text.map_or_else(String::new, |text| format!("did you mean {text}? "));
        let (protocol, address) = text.split_once(':').ok_or_else(|| format!("{}{FORM}", meant(whole_of(text))))?;
        let protocol = match protocol {
            "fastcgi" => Protocol::FastCgi,
            "scgi" => Protocol::Scgi,
            "http" => Protocol::Http,
            "https" => {
                return Err(
                    "TLS is not supported: let a web server in front terminate it, and connect over http or fastcgi"
                        .to_owned(),
                );
            }
            other => {
                let unknown = format!("unknown protocol '{other}' (this version supports fastcgi, scgi and http)");
                return Err(format!("{unknown}; {}{FORM}", meant(whole_of(text))));
            }
        };
        let address = if let Some(name) = address.strip_prefix("unix:@") {
            Address::Abstract(name.to_owned())
        } else if let Some(path) = address.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(format!("the path after 'unix:' is empty; {FORM}"));
            }
            Address::Path(PathBuf::from(path))
        } else if address == "systemd" {
            Address::Systemd(None)
        } else if let Some(name) = address.strip_prefix("systemd:") {
            Address::Systemd(Some(name.to_owned()))
        } else if let Some(number) = address.strip_prefix("fd:") {
            let number = number.parse().ok().filter(|&fd: &RawFd| fd >= 0);
            Address::Inherited(number.ok_or(format!("'fd:' takes the number of a descriptor; {FORM}"))?)
        } else {
            let hint = || meant(address_of(address).map(|address| format!("{protocol}:{address}")));
            let port = address.rsplit_once(':').map(|(_, port)| port);
            let port = port.ok_or_else(|| format!("no port in '{address}'; {}{FORM}", hint()))?;
            if port.parse::<u16>().is_err() {
                return Err(format!("'{port}' is not a port (0 to 65535); {}{FORM}", hint()));
            }
            if address.contains('/') {
                return Err(format!("'{address}' is not HOST:PORT; {}{FORM}", hint()));
            }
            Address::Tcp(address.to_owned())
        };
        Ok(Self { protocol, address })
    }
}

/// Returns the address that was probably meant by an invalid address, for an error message.
fn address_of(text: &str) -> Option<String> {
    let is_path = |text: &str| text.starts_with(['/', '.']) || text.ends_with(".sock");
    if let Some(rest) = text.strip_prefix("//") {
        let host = rest.trim_end_matches('/');
        return host.parse_port().map(|_| host.to_owned());
    }
    if is_path(text) {
        return Some(format!("unix:{text}"));
    }
    if let Some(name) = text.strip_prefix('@') {
        return Some(format!("unix:@{name}"));
    }
    if text.parse::<u16>().is_ok() {
        return Some(format!("127.0.0.1:{text}"));
    }
    None
}

/// Returns the value that was probably meant by a value without a valid protocol, for an error message.
fn whole_of(text: &str) -> Option<String> {
    let (first, rest) = text.split_once(':').unwrap_or((text, ""));
    match first {
        "fcgi" | "fast-cgi" | "FastCGI" => return Some(format!("fastcgi:{rest}")),
        "HTTP" | "tcp" | "h2c" | "http1" | "http2" => return Some(format!("http:{rest}")),
        // Clients of Unix sockets are web servers, mostly over FastCGI.
        "unix" | "fd" | "systemd" => return Some(format!("fastcgi:{text}")),
        _ => {}
    }
    if text.parse_port().is_some() {
        let host = text.rsplit_once(':').map_or("", |(host, _)| host);
        if host.contains(':') && !host.starts_with('[') {
            return None;
        }
        return Some(if host.is_empty() { format!("http:0.0.0.0{text}") } else { format!("http:{text}") });
    }
    address_of(text).map(|address| {
        if address.starts_with("unix:") { format!("fastcgi:{address}") } else { format!("http:{address}") }
    })
}

trait Port {
    /// Returns the port of `HOST:PORT`.
    fn parse_port(&self) -> Option<u16>;
}

impl Port for str {
    fn parse_port(&self) -> Option<u16> {
        self.rsplit_once(':')?.1.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bind_is_read_and_written_back() {
        for text in [
            "http:127.0.0.1:8080",
            "fastcgi:unix:/run/a b.sock",
            "fastcgi:unix:@name",
            "scgi:unix:/run/a.sock",
            "http:fd:3",
            "http:systemd",
            "fastcgi:systemd:app.socket",
            "http:[::1]:80",
        ] {
            assert_eq!(text.parse::<Bind>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn all_ipv6_addresses_include_ipv4_unless_another_bind_does() {
        let binds: Vec<Bind> = [
            "http:[::]:80",
            "http:0.0.0.0:80",
            "http:[::]:81",
            "fastcgi:127.0.0.1:82",
            "http:[::]:82",
            "http:[::1]:80",
        ]
        .map(|text| text.parse().unwrap())
        .to_vec();
        let leaves: Vec<bool> = binds.iter().map(|bind| bind.leaves_ipv4(&binds)).collect();
        assert_eq!(leaves, [true, false, false, false, true, false]);
    }

    #[test]
    fn the_error_for_an_invalid_bind_names_the_expected_form() {
        for (text, said) in [
            ("8080", "expected PROTO:ADDR"),
            ("gopher:127.0.0.1:70", "unknown protocol 'gopher'"),
            ("http:localhost", "no port in 'localhost'"),
            ("http:localhost:http", "'http' is not a port"),
            ("http:fd:-1", "takes the number of a descriptor"),
            ("fastcgi:unix:", "is empty"),
            ("fastcgi:/run/x.sock", "did you mean fastcgi:unix:/run/x.sock?"),
            ("http:./x.sock", "did you mean http:unix:./x.sock?"),
            ("scgi:x.sock", "did you mean scgi:unix:x.sock?"),
            ("http:@name", "did you mean http:unix:@name?"),
            ("unix:/run/x.sock", "did you mean fastcgi:unix:/run/x.sock?"),
            ("/run/x.sock", "did you mean fastcgi:unix:/run/x.sock?"),
            ("127.0.0.1:8080", "did you mean http:127.0.0.1:8080?"),
            (":8080", "did you mean http:0.0.0.0:8080?"),
            ("8080", "did you mean http:127.0.0.1:8080?"),
            ("http:8080", "did you mean http:127.0.0.1:8080?"),
            ("http://127.0.0.1:8080", "did you mean http:127.0.0.1:8080?"),
            ("http://127.0.0.1:8080/", "did you mean http:127.0.0.1:8080?"),
            ("fcgi:unix:/x", "did you mean fastcgi:unix:/x?"),
            ("https:0.0.0.0:443", "let a web server in front terminate it"),
        ] {
            let error = text.parse::<Bind>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
