//! The directories whose files gateways send: `--static` and `--sendfile`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The directories whose files gateways send.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FilesConfig {
    pub(crate) statics: Vec<StaticDir>,
    pub(crate) sendfile: Vec<SendfileDir>,
}

/// A directory whose files clients can request: `URL=DIR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StaticDir {
    pub(crate) url: UrlPrefix,
    pub(crate) directory: PathBuf,
}

/// A directory from which the application can select files: `DIR` or `URL=DIR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SendfileDir {
    /// The prefix of the URLs that `X-Accel-Redirect` can name.
    pub(crate) url: Option<UrlPrefix>,
    pub(crate) directory: PathBuf,
}

/// The beginning of decoded URL paths: segments, each with a slash before it. Empty for all paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UrlPrefix(String);

impl UrlPrefix {
    /// Whether all paths begin with this prefix.
    pub(crate) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the segments of the prefix.
    pub(crate) fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').skip(1)
    }
}

impl fmt::Display for UrlPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "/" } else { &self.0 })
    }
}

impl FromStr for UrlPrefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(path) = text.strip_prefix('/') else {
            return Err(format!("'{text}' is not a URL path: it must begin with a slash, as in /assets"));
        };
        if text.contains(['?', '#', '%']) || text.contains(char::is_control) {
            return Err(format!("'{text}' is not a URL path: write it decoded, and without a query, as in /my files"));
        }
        let path = path.strip_suffix('/').unwrap_or(path);
        if text.starts_with("//")
            || !path.is_empty() && path.split('/').any(|segment| ["", ".", ".."].contains(&segment))
        {
            return Err(format!("'{text}' is not a URL path: it must not contain //, /./ or /../"));
        }
        Ok(Self(if path.is_empty() { String::new() } else { format!("/{path}") }))
    }
}

impl FromStr for StaticDir {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((url, directory)) if !directory.is_empty() => {
                Ok(Self { url: url.parse()?, directory: directory.into() })
            }
            _ => Err(format!("'{text}' has no URL or no directory (expected URL=DIR, as in /assets=/srv/app/assets)")),
        }
    }
}

impl FromStr for SendfileDir {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Both parts are absolute, so a `=` in a name of DIR is not mistaken for the separator.
        let (url, directory) = match text.split_once("=/") {
            Some((url, rest)) => (Some(url.parse()?), format!("/{rest}")),
            None => (None, text.to_owned()),
        };
        if !Path::new(&directory).is_absolute() {
            return Err(format!(
                "'{text}' is not an absolute path (expected DIR or URL=DIR, as in /private=/srv/files)"
            ));
        }
        Ok(Self { url, directory: directory.into() })
    }
}

impl FilesConfig {
    /// Returns each directory with its flag.
    pub(crate) fn directories(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let statics = self.statics.iter().map(|entry| ("--static", entry.directory.as_path()));
        statics.chain(self.sendfile.iter().map(|entry| ("--sendfile", entry.directory.as_path())))
    }

    /// Checks that each URL is given once.
    ///
    /// # Errors
    /// Returns a message for the operator.
    pub(crate) fn check(&self) -> Result<(), String> {
        let statics = self.statics.iter().map(|entry| ("--static", &entry.url));
        let sendfile = self.sendfile.iter().filter_map(|entry| Some(("--sendfile", entry.url.as_ref()?)));
        let all: Vec<_> = statics.chain(sendfile).collect();
        for (index, (flag, url)) in all.iter().enumerate() {
            if all[..index].contains(&(*flag, *url)) {
                return Err(format!("{flag}: the URL {url} is given twice (remove one of them)"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_directory_has_a_url() {
        for (text, url, directory) in
            [("/=/srv", "/", "/srv"), ("/a/=b", "/a", "b"), ("/a/b c=/d=e/", "/a/b c", "/d=e/")]
        {
            let parsed: StaticDir = text.parse().unwrap();
            assert_eq!((parsed.url.to_string().as_str(), parsed.directory.as_path()), (url, Path::new(directory)));
        }
        for text in ["", "/a", "/a=", "a=/b", "=/b", "/a%20b=/c", "/a//b=/c", "/..=/c", "//=/c", "/a?b=/c", "/a\n=/c"] {
            assert!(text.parse::<StaticDir>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_directory_for_the_application_is_absolute_and_may_have_a_url() {
        let parsed = |text: &str| -> Option<(Option<String>, String)> {
            let SendfileDir { url, directory } = text.parse().ok()?;
            Some((url.map(|url| url.to_string()), directory.display().to_string()))
        };
        let expected = |url: Option<&str>, directory: &str| Some((url.map(ToOwned::to_owned), directory.to_owned()));
        assert_eq!(parsed("/srv/a"), expected(None, "/srv/a"));
        assert_eq!(parsed("/srv/a=b"), expected(None, "/srv/a=b"));
        assert_eq!(parsed("/x=/srv/a"), expected(Some("/x"), "/srv/a"));
        for text in ["", "srv", "x=/srv", "/a%41=/srv"] {
            assert_eq!(parsed(text), None, "{text}");
        }
    }

    #[test]
    fn a_url_is_given_once_for_each_flag() {
        let config = |statics: &[&str], sendfile: &[&str]| FilesConfig {
            statics: statics.iter().map(|text| text.parse().unwrap()).collect(),
            sendfile: sendfile.iter().map(|text| text.parse().unwrap()).collect(),
        };
        assert_eq!(config(&["/a=/b", "/=/b"], &["/a=/b", "/b", "/c"]).check(), Ok(()));
        assert!(config(&["/a=/b", "/a/=/c"], &[]).check().unwrap_err().contains("--static: the URL /a is given twice"));
        assert!(config(&[], &["/a=/b", "/a=/c"]).check().unwrap_err().contains("--sendfile"));
    }
}
