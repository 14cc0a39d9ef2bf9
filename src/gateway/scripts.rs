//! Maps the path of a request to a script below `--root`, for programs that run scripts (php-cgi).
//!
//! - The script of a request is the first beginning of its path that ends in `.php`, is followed by `/` or by the end of
//!   the path, and is a regular file. The rest of the path is PATH_INFO (RFC 3875, section 4.1.5).
//! - A path that ends in `/` is that of the file `index.php` in this directory, if there is one.
//! - Otherwise, the script is `--index`, with an empty PATH_INFO. Without `--index`, there is no such page.
//!
//! The bytes of the decoded path are compared exactly: no case is folded, so `x.PHP` is not a script. The file is looked
//! up below the root (`beneath.rs`), so neither `..` nor a symbolic link leads out of it.
//!
//! The result for a path is used again for [`VALID_TIME`], because the lookup takes several system calls. A file that is
//! created or removed takes effect after that time. A path without a script is looked up each time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::beneath::{Beneath, decode};
use crate::config::gateway::Scripts;
use crate::protocol::cgi::variables::ScriptPaths;

/// How long the script of a path is used again without a lookup.
const VALID_TIME: Duration = Duration::from_secs(1);
/// Maximum number of paths whose script is stored, and maximum length of such a path.
const MAX_STORED: usize = 1024;
const MAX_STORED_PATH: usize = 256;

const EXTENSION: &[u8] = b".php";
const DIRECTORY_INDEX: &[u8] = b"index.php";

/// The directory of the scripts.
#[derive(Debug)]
pub(super) struct ScriptRoot {
    directory: Beneath,
    index: Option<Vec<u8>>,
    found: RefCell<HashMap<String, (Instant, Rc<Script>)>>,
}

/// The script of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Script {
    /// The URL path of the script; begins with a slash.
    pub(super) name: Vec<u8>,
    pub(super) filename: Vec<u8>,
    /// The rest of the URL path, if there is one.
    pub(super) path_info: Option<Vec<u8>>,
}

impl ScriptRoot {
    /// Opens the directory, if there is one.
    ///
    /// # Errors
    /// Returns a message for the operator if the directory cannot be opened.
    pub(super) fn open(scripts: &Scripts) -> Result<Option<Self>, String> {
        let Some(root) = &scripts.root else { return Ok(None) };
        let directory = Beneath::open(root, "--root")?;
        let index = scripts.index.as_ref().map(|index| index.trim_start_matches('/').as_bytes().to_vec());
        Ok(Some(Self { directory, index, found: RefCell::default() }))
    }

    /// Returns the path of the directory, without a slash at its end.
    pub(super) fn path(&self) -> &[u8] {
        self.directory.path()
    }

    /// Returns the script for a URL path, or `None` if there is none. The result may be up to [`VALID_TIME`] old.
    pub(super) fn find(&self, url_path: &str) -> Option<Rc<Script>> {
        let now = Instant::now();
        if let Some((since, script)) = self.found.borrow().get(url_path)
            && now.duration_since(*since) < VALID_TIME
        {
            return Some(Rc::clone(script));
        }
        let script = Rc::new(self.look_up(url_path)?);
        if url_path.len() <= MAX_STORED_PATH {
            let mut found = self.found.borrow_mut();
            if found.len() >= MAX_STORED {
                found.clear();
            }
            found.insert(url_path.to_owned(), (now, Rc::clone(&script)));
        }
        Some(script)
    }

    fn look_up(&self, url_path: &str) -> Option<Script> {
        let path = decode(url_path)?;
        if let Some(end) = script_ends(&path).find(|&end| self.directory.is_file(&path[1..end])) {
            let path_info = Some(path[end..].to_vec()).filter(|rest| !rest.is_empty());
            return Some(self.script(&path[1..end], path_info));
        }
        if path.ends_with(b"/") {
            let index = [&path[1..], DIRECTORY_INDEX].concat();
            if self.directory.is_file(&index) {
                return Some(self.script(&index, None));
            }
        }
        let index = self.index.as_ref()?;
        self.directory.is_file(index).then(|| self.script(index, None))
    }

    fn script(&self, relative: &[u8], path_info: Option<Vec<u8>>) -> Script {
        let name = [b"/", relative].concat();
        Script { filename: [self.path(), &name].concat(), name, path_info }
    }
}

/// Returns the positions at which the beginning of a path may be the path of a script.
fn script_ends(path: &[u8]) -> impl Iterator<Item = usize> {
    let ends = (1..=path.len()).filter(|&end| path[..end].ends_with(EXTENSION));
    ends.filter(|&end| matches!(path.get(end), None | Some(b'/')))
}

/// Returns the paths that a program receives: those of the script, or only PATH_INFO if the program handles all paths itself.
pub(super) fn paths<'a>(script: Option<(&'a ScriptRoot, &'a Script)>, path_info: Option<&'a [u8]>) -> ScriptPaths<'a> {
    let Some((root, script)) = script else { return ScriptPaths { path_info, ..ScriptPaths::default() } };
    ScriptPaths {
        document_root: Some(root.path()),
        script_filename: Some(&script.filename),
        script_name: Some(&script.name),
        path_info: script.path_info.as_deref(),
    }
}

/// Returns the decoded path of a request, for PATH_INFO.
pub(super) fn path_info(url_path: &str) -> Option<Vec<u8>> {
    decode(url_path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn root(index: Option<&str>) -> (tempfile::TempDir, ScriptRoot) {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("www/sub/dir.php")).unwrap();
        for file in ["www/index.php", "www/a.php", "www/sub/index.php", "www/sub/dir.php/b.php", "www/x.jpg", "out.php"]
        {
            fs::write(at(file), "").unwrap();
        }
        std::os::unix::fs::symlink("../out.php", at("www/link.php")).unwrap();
        std::os::unix::fs::symlink("a.php", at("www/inner.php")).unwrap();
        let scripts = Scripts { root: Some(at("www/")), index: index.map(ToOwned::to_owned) };
        let root = ScriptRoot::open(&scripts).unwrap().unwrap();
        (directory, root)
    }

    fn found(root: &ScriptRoot, path: &str) -> Option<(String, Option<String>)> {
        let script = root.look_up(path)?;
        assert_eq!(root.find(path).as_deref(), Some(&script));
        assert_eq!(script.filename, [root.path(), &script.name].concat());
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Some((text(script.name), script.path_info.map(text)))
    }

    #[test]
    fn a_path_is_split_after_the_first_script_that_is_a_file() {
        let (_directory, root) = root(None);
        let script = |name: &str, rest: Option<&str>| Some((name.to_owned(), rest.map(ToOwned::to_owned)));
        for (path, expected) in [
            ("/a.php", script("/a.php", None)),
            ("/a.php/", script("/a.php", Some("/"))),
            ("/a.php/more/b.php", script("/a.php", Some("/more/b.php"))),
            ("/a%2ephp/x%20y", script("/a.php", Some("/x y"))),
            ("/sub/dir.php/b.php/z", script("/sub/dir.php/b.php", Some("/z"))),
            ("/", script("/index.php", None)),
            ("/sub/", script("/sub/index.php", None)),
            ("/sub/../a.php", script("/sub/../a.php", None)),
            ("/inner.php", script("/inner.php", None)),
            ("/x.jpg/.php", None),
            ("/x.jpg", None),
            ("/a.PHP", None),
            ("/a.php%00.jpg", None),
            ("/a.phpx", None),
            ("/ȺȺȺȺa.php.txt.php", None),
            ("/../out.php", None),
            ("/%2e%2e/out.php", None),
            ("/link.php", None),
            ("/sub/dir.php", None),
            ("/%", None),
            ("*", None),
        ] {
            assert_eq!(found(&root, path), expected, "{path}");
        }
    }

    #[test]
    fn the_front_controller_serves_every_other_path() {
        let (_directory, root) = root(Some("index.php"));
        for path in ["/news/7", "/x.jpg/.php", "/sub/none.php/", "/../out.php"] {
            assert_eq!(found(&root, path), Some(("/index.php".to_owned(), None)), "{path}");
        }
        assert_eq!(found(&root, "/a.php").unwrap().0, "/a.php");
    }

    #[test]
    fn the_script_of_a_path_is_stored_and_the_store_is_bounded() {
        let (_directory, root) = root(Some("index.php"));
        let first = root.find("/a.php").unwrap();
        assert!(Rc::ptr_eq(&first, &root.find("/a.php").unwrap()));
        for number in 0..3 * MAX_STORED {
            root.find(&format!("/news/{number}")).unwrap();
            assert!(root.found.borrow().len() <= MAX_STORED);
        }
        let long = format!("/{}", "x".repeat(MAX_STORED_PATH));
        assert!(root.find(&long).is_some() && !root.found.borrow().contains_key(&long));
    }

    #[test]
    fn a_missing_root_is_an_error_that_names_the_flag() {
        let scripts = Scripts { root: Some("/nonexistent/forkyard".into()), index: None };
        assert!(ScriptRoot::open(&scripts).unwrap_err().contains("--root"));
    }
}
