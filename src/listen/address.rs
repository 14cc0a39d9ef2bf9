//! What `--bind PROTO:ADDR` says: text to values and back, nothing else.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

/// What is spoken on a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// FastCGI 1.0, for a web server in front.
    FastCgi,
    /// SCGI, for a web server in front.
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

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// `HOST:PORT`; port 0 lets the system choose.
    Tcp(String),
    /// `unix:PATH`.
    Path(PathBuf),
    /// `unix:@NAME`, in Linux's abstract namespace.
    Abstract(String),
    /// `fd:N`, a listening socket that was inherited under this number.
    Inherited(RawFd),
    /// `systemd[:NAME]`, the sockets that systemd passed, or those of that name.
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
    /// What is spoken there.
    pub(crate) protocol: Protocol,
    /// Where that is.
    pub(crate) address: Address,
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
        let (protocol, address) = text.split_once(':').ok_or(FORM)?;
        let protocol = match protocol {
            "fastcgi" => Protocol::FastCgi,
            "scgi" => Protocol::Scgi,
            "http" => Protocol::Http,
            other => {
                return Err(format!("unknown protocol '{other}' (this version speaks fastcgi, scgi and http); {FORM}"));
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
            let port =
                address.rsplit_once(':').map(|(_, port)| port).ok_or(format!("no port in '{address}'; {FORM}"))?;
            if port.parse::<u16>().is_err() {
                return Err(format!("'{port}' is not a port (0 to 65535); {FORM}"));
            }
            Address::Tcp(address.to_owned())
        };
        Ok(Self { protocol, address })
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
    fn a_wrong_bind_says_what_is_expected() {
        for (text, said) in [
            ("8080", "expected PROTO:ADDR"),
            ("gopher:127.0.0.1:70", "unknown protocol 'gopher'"),
            ("http:localhost", "no port in 'localhost'"),
            ("http:localhost:http", "'http' is not a port"),
            ("http:fd:-1", "takes the number of a descriptor"),
            ("fastcgi:unix:", "is empty"),
        ] {
            let error = text.parse::<Bind>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
