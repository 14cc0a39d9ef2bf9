//! The environment of a CGI program: that of the runner, and the variables of the request.
//!
//! - Variables of the runner that could be mistaken for those of a request are left out. `HTTP_PROXY` in the shell of the
//!   operator, for example, would be the header `Proxy` of every request.
//! - A variable of a request replaces one of the runner. Over HTTP, the gateway sets only variables of RFC 3875 and
//!   headers, whose names begin with `HTTP_`. A web server in front can set any variable, and so can every process that
//!   can connect to its FastCGI or SCGI socket.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Command;

/// Variables of a request without the prefix `HTTP_` that are not in every request.
const OF_REQUESTS: [&str; 12] = [
    "AUTH_TYPE",
    "CONTENT_LENGTH",
    "CONTENT_TYPE",
    "HTTPS",
    "PATH_INFO",
    "PATH_TRANSLATED",
    "QUERY_STRING",
    "REMOTE_HOST",
    "REMOTE_IDENT",
    "REMOTE_PORT",
    "REMOTE_USER",
    "SCRIPT_FILENAME",
];

/// The variables that all requests have in common.
#[derive(Debug)]
pub(super) struct Environment(Vec<(OsString, OsString)>);

impl Environment {
    pub(super) fn of_this_process() -> Self {
        Self::of(std::env::vars_os())
    }

    fn of(variables: impl Iterator<Item = (OsString, OsString)>) -> Self {
        Self(variables.filter(|(name, _)| !is_of_request(name.as_bytes())).collect())
    }

    /// Sets the environment of a program.
    pub(super) fn apply<'a>(&self, command: &mut Command, request: impl Iterator<Item = (&'a [u8], &'a [u8])>) {
        command.env_clear().envs(self.0.iter().map(|(name, value)| (name, value)));
        for (name, value) in request.filter(|(name, value)| is_valid(name, value)) {
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
    }
}

fn is_of_request(name: &[u8]) -> bool {
    name.starts_with(b"HTTP_") || OF_REQUESTS.iter().any(|other| other.as_bytes() == name)
}

/// Whether a variable can be part of an environment.
fn is_valid(name: &[u8], value: &[u8]) -> bool {
    !name.is_empty() && !name.contains(&b'=') && !name.contains(&0) && !value.contains(&0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_has_the_variables_of_the_request_and_no_stale_ones() {
        let own = [("PATH", "/bin"), ("HTTP_PROXY", "evil"), ("CONTENT_LENGTH", "9"), ("A", "1"), ("B", "1")];
        let environment = Environment::of(own.into_iter().map(|(name, value)| (name.into(), value.into())));
        let mut command = Command::new("/bin/true");
        command.env("STALE", "1");
        let request: [(&[u8], &[u8]); 6] = [
            (b"HTTP_HOST", b"h"),
            (b"B", b"2"),
            (b"", b"x"),
            (b"N=M", b"x"),
            (b"NUL", b"a\0b"),
            (b"REQUEST_METHOD", b"GET"),
        ];
        environment.apply(&mut command, request.into_iter());
        let mut set: Vec<_> = command
            .get_envs()
            .map(|(name, value)| format!("{}={}", name.to_string_lossy(), value.unwrap_or_default().to_string_lossy()))
            .collect();
        set.sort();
        assert_eq!(set, ["A=1", "B=2", "HTTP_HOST=h", "PATH=/bin", "REQUEST_METHOD=GET"]);
    }
}
