//! Splits the path of a request into segments, and decides which paths can name a static file (pure).
//!
//! - The percent-encoding is decoded once, and slashes are merged, as nginx does. `%2f` is a slash.
//! - A segment that begins with a dot names no static file, except `.well-known` (RFC 8615). This excludes `.` and `..`,
//!   and files such as `.env` and `.git/config`.
//! - A PHP script is never a static file, in any spelling that some file system or PHP configuration treats as one, and
//!   neither is its compressed form: its source may contain passwords.

use std::fmt::Write as _;

use crate::config::files::UrlPrefix;
use crate::gateway::beneath::decode;

/// The path of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UrlPath {
    segments: Vec<Vec<u8>>,
    ends_in_slash: bool,
}

/// The part of a path below a prefix.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rest<'a> {
    segments: &'a [Vec<u8>],
    pub(super) ends_in_slash: bool,
}

impl UrlPath {
    /// Returns `None` if the path does not begin with a slash, is malformed, or contains a NUL.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let decoded = decode(path)?;
        let ends_in_slash = decoded.ends_with(b"/");
        let segments = decoded.split(|&byte| byte == b'/').filter(|segment| !segment.is_empty());
        Some(Self { segments: segments.map(<[u8]>::to_vec).collect(), ends_in_slash })
    }

    /// Returns the part of the path below a prefix, or `None` if the path does not begin with the prefix.
    pub(super) fn below(&self, prefix: &UrlPrefix) -> Option<Rest<'_>> {
        let mut segments = self.segments.as_slice();
        for expected in prefix.segments() {
            let (first, rest) = segments.split_first()?;
            if first != expected.as_bytes() {
                return None;
            }
            segments = rest;
        }
        Some(Rest { segments, ends_in_slash: self.ends_in_slash })
    }

    /// Returns this path with a slash at its end, in the form of a URL. A client cannot mistake the result for the URL of
    /// another host, because it does not begin with `//` or `/\`.
    pub(super) fn as_directory(&self) -> String {
        let mut url = "/".to_owned();
        for segment in &self.segments {
            for &byte in segment {
                if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte) {
                    url.push(char::from(byte));
                } else {
                    let _ = write!(url, "%{byte:02X}"); // a string cannot fail
                }
            }
            url.push('/');
        }
        url
    }
}

impl Rest<'_> {
    /// Returns the path in the file system, relative to the directory of the prefix.
    pub(super) fn relative(&self) -> Vec<u8> {
        self.segments.join(&b'/')
    }

    /// Whether a client may request the file with this path.
    pub(super) fn can_be_static(&self) -> bool {
        let is_hidden = |segment: &Vec<u8>| segment.starts_with(b".") && segment != b".well-known";
        let last = self.segments.last().map_or(&[][..], Vec::as_slice);
        !self.segments.iter().any(is_hidden) && !is_script(last)
    }
}

/// Whether this is the name of a PHP script.
fn is_script(name: &[u8]) -> bool {
    let name = name.to_ascii_lowercase();
    let mut name = name.as_slice();
    for suffix in [b".gz", b".br"] {
        name = name.strip_suffix(suffix).unwrap_or(name);
    }
    // Some file systems ignore points and spaces at the end of a name.
    while let [rest @ .., b'.' | b' ' | b'~'] = name {
        name = rest;
    }
    let Some(at) = name.iter().rposition(|&byte| byte == b'.') else { return false };
    let extension = name.get(at + 1..).unwrap_or_default();
    extension.starts_with(b"php") || [b"phtml".as_slice(), b"pht", b"phar"].contains(&extension)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn below(path: &str, prefix: &str) -> Option<String> {
        let path = UrlPath::parse(path)?;
        let rest = path.below(&prefix.parse().unwrap())?;
        Some(format!("{}{}", rest.relative().escape_ascii(), if rest.ends_in_slash { "/" } else { "" }))
    }

    #[test]
    fn a_prefix_ends_at_a_slash() {
        for (path, prefix, expected) in [
            ("/", "/", Some("/")),
            ("/a", "/", Some("a")),
            ("/a//b/", "/", Some("a/b/")),
            ("/a/b", "/a", Some("b")),
            ("/a", "/a", Some("")),
            ("/a/", "/a/", Some("/")),
            ("/%61%2fb", "/a", Some("b")),
            ("/ab", "/a", None),
            ("/", "/a", None),
            ("/A/b", "/a", None),
            ("/a%00", "/", None),
            ("*", "/", None),
        ] {
            assert_eq!(below(path, prefix).as_deref(), expected, "{path} below {prefix}");
        }
    }

    #[test]
    fn hidden_files_and_scripts_are_not_static() {
        let can_be_static =
            |path: &str| UrlPath::parse(path).unwrap().below(&"/".parse().unwrap()).unwrap().can_be_static();
        for path in [
            "/",
            "/a.txt",
            "/.well-known/acme-challenge/x",
            "/a.php.html",
            "/php",
            "/a.php/logo.png",
            "/%252e%252e/x",
            "/a..b/c...",
            "/..%5cx".trim_start_matches("/.."),
        ] {
            let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
            assert!(can_be_static(&path), "{path}");
        }
        for path in [
            "/.env",
            "/.git/config",
            "/a/.htaccess",
            "/..",
            "/../x",
            "/a/%2e%2e/x",
            "/a/..%2fx",
            "/..%5cx",
            "/./a",
            "/a.php",
            "/a.PHP",
            "/a.pHp5",
            "/a.phtml",
            "/a.phar",
            "/a.php.",
            "/a.php%20",
            "/a.php~",
            "/a.php.gz",
            "/a.PHP.br",
            "/a.phps",
            "/.well-known/x.php",
            "/.well-known2/x",
        ] {
            assert!(!can_be_static(path), "{path}");
        }
    }

    #[test]
    fn a_redirect_stays_on_this_host() {
        for (path, expected) in [
            ("/a", "/a/"),
            ("//evil.example", "/evil.example/"),
            ("/%2f/evil.example", "/evil.example/"),
            ("/%5cevil.example", "/%5Cevil.example/"),
            ("/a%20b/c%0d%0aX:%20y", "/a%20b/c%0D%0AX:%20y/"),
            ("/caf%c3%a9", "/caf%C3%A9/"),
        ] {
            assert_eq!(UrlPath::parse(path).unwrap().as_directory(), expected, "{path}");
        }
    }
}
