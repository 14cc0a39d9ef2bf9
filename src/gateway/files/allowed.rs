//! Maps what an application has selected to a file in one of the directories of `--sendfile` (pure, except for
//! [`Allowed::open`]).

use std::os::unix::ffi::OsStringExt as _;
use std::sync::Arc;

use super::url_path::UrlPath;
use crate::config::files::{SendfileDir, UrlPrefix};
use crate::gateway::beneath::Beneath;
use crate::protocol::sendfile::Selection;

/// A directory from which an application may select files.
#[derive(Debug)]
pub(super) struct Allowed {
    url: Option<UrlPrefix>,
    /// The absolute path as configured, and without symbolic links. Applications send either.
    paths: [Vec<u8>; 2],
    pub(super) directory: Arc<Beneath>,
}

impl Allowed {
    /// # Errors
    /// Returns a message for the operator if the directory cannot be opened.
    pub(super) fn open(SendfileDir { url, directory }: &SendfileDir) -> Result<Self, String> {
        let opened = Beneath::open(directory, "--sendfile")?;
        let real = directory.canonicalize().map(|path| path.into_os_string().into_vec());
        let real = real.unwrap_or_else(|_| opened.path().to_vec());
        let real = real.strip_suffix(b"/").map(<[u8]>::to_vec).unwrap_or(real);
        Ok(Self { url: url.clone(), paths: [opened.path().to_vec(), real], directory: Arc::new(opened) })
    }
}

/// Returns the directory and the relative path of the selected file. The longest path or URL applies. Returns `None` if
/// no directory contains the file.
pub(super) fn find(allowed: &[Allowed], selection: &Selection) -> Option<(Arc<Beneath>, Vec<u8>)> {
    let found = match selection {
        Selection::Path(path) => {
            let all = allowed.iter().flat_map(|entry| entry.paths.iter().map(move |path| (entry, path)));
            let below = all.filter_map(|(entry, prefix)| {
                let rest = path.as_bytes().strip_prefix(prefix.as_slice())?;
                Some((prefix.len(), entry, rest.strip_prefix(b"/")?.to_vec()))
            });
            below.max_by_key(|(length, ..)| *length)
        }
        Selection::Url(url) => {
            let url = std::str::from_utf8(url.as_bytes()).ok()?;
            let path = UrlPath::parse(url.split(['?', '#']).next()?)?;
            let below = allowed.iter().filter_map(|entry| {
                let prefix = entry.url.as_ref()?;
                let rest = path.below(prefix)?;
                let mut relative = rest.relative();
                relative.extend(rest.ends_in_slash.then_some(b'/')); // names no file
                Some((prefix.segments().count(), entry, relative))
            });
            below.max_by_key(|(length, ..)| *length)
        }
    };
    let (_, entry, mut relative) = found?;
    let slashes = relative.iter().take_while(|&&byte| byte == b'/').count();
    relative.drain(..slashes);
    Some((Arc::clone(&entry.directory), relative))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_selection_names_a_file_below_an_allowed_directory() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().canonicalize().unwrap();
        std::fs::create_dir_all(base.join("files/inner")).unwrap();
        std::os::unix::fs::symlink("files", base.join("link")).unwrap();
        let base = base.display().to_string();
        let open = |text: String| Allowed::open(&text.parse().unwrap()).unwrap();
        let allowed = [
            open(format!("/private={base}/link/")),
            open(format!("/private/inner={base}/files/inner")),
            open(format!("{base}/files/inner")),
        ];
        let found = |selection: Selection| {
            let (directory, relative) = find(&allowed, &selection)?;
            let path = String::from_utf8(directory.path().to_vec()).unwrap();
            Some((path.strip_prefix(&base).unwrap().to_owned(), String::from_utf8(relative).unwrap()))
        };
        let expected = |(path, relative): (&str, &str)| (path.to_owned(), relative.to_owned());
        for (path, result) in [
            ("/link/a%20b", Some(("/link", "a%20b"))),
            ("/files/a", Some(("/link", "a"))),
            ("/files//a", Some(("/link", "a"))),
            ("/files/inner/a", Some(("/files/inner", "a"))),
            ("/files/../secret", Some(("/link", "../secret"))), // refused when it is opened
            ("/files", None),
            ("/filesystem/a", None),
            ("/secret", None),
        ] {
            let path = HeaderValue::try_from(format!("{base}{path}")).unwrap();
            assert_eq!(found(Selection::Path(path.clone())), result.map(expected), "{path:?}");
        }
        for (url, result) in [
            ("/private/a%20b?x=1", Some(("/link", "a b"))),
            ("/private/inner/a", Some(("/files/inner", "a"))),
            ("/private/a/", Some(("/link", "a/"))),
            ("/private/%2e%2e/secret", Some(("/link", "../secret"))),
            ("/private/%00", None),
            ("/privately/a", None),
            ("private/a", None),
            ("@named", None),
            ("http://localhost/private/a", None),
        ] {
            let value = HeaderValue::from_static(url);
            assert_eq!(found(Selection::Url(value)), result.map(expected), "{url}");
        }
        assert_eq!(found(Selection::Path(HeaderValue::from_static("link/a"))), None, "a relative path");
    }
}
