//! Sends files without an app process: the files below `--static`, and those that an application selects in its response
//! (`--sendfile`).
//!
//! - A static directory serves GET and HEAD. A path without a file is answered with 404; below the URL `/`, the
//!   application receives it. A path that ends in `/` names `index.html` in that directory. A directory that has this file
//!   is redirected to the path with the slash.
//! - `a.css.br` and `a.css.gz` are variants of `a.css`, for clients that accept them.
//! - A response with `X-Sendfile` or `X-Accel-Redirect` is replaced by the selected file. The body of the response is
//!   discarded, so the app process does not wait for the client. The other headers are kept, except those that describe
//!   the discarded body.
//! - All file operations run on threads (`threads.rs`).

mod allowed;
mod body;
mod coding;
mod conditions;
mod ranges;
mod response;
mod threads;
mod url_path;

use std::io;
use std::sync::Arc;

use http::header::{self, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Method, Response, StatusCode};

use self::allowed::Allowed;
pub(super) use self::body::FileBody;
use self::coding::Coding;
use self::ranges::ByteRange;
use self::response::{Content, content_type, respond};
use self::threads::FileThreads;
use self::url_path::UrlPath;
use super::beneath::{Beneath, OpenError, OpenFile};
use super::body::GatewayBody;
use super::{came_with_variables, refusal, unavailable};
use crate::config::files::UrlPrefix;
use crate::config::gateway::GatewayConfig;
use crate::protocol::cgi::{ClientInfo, has_no_body};
use crate::protocol::sendfile::{self, Selection};
use crate::sys;

const DIRECTORY_INDEX: &[u8] = b"index.html";

/// The directories whose files a gateway sends.
#[derive(Debug)]
pub(super) struct Files {
    /// Those with the longest URLs come first.
    statics: Vec<(UrlPrefix, Arc<Beneath>)>,
    sendfile: Vec<Allowed>,
    /// The script that serves all other paths. It is not a static file, whatever its extension.
    index: Option<Vec<u8>>,
    threads: FileThreads,
}

/// What a path below a static directory names.
enum Located {
    File {
        content: Content,
        name: Vec<u8>,
        /// Whether the file has compressed variants.
        varies: bool,
    },
    /// A directory with an index, without the slash at the end.
    Directory,
}

impl Files {
    /// Opens all directories.
    ///
    /// # Errors
    /// Returns a message for the operator if one of them cannot be opened.
    pub(super) fn open(gateway: &GatewayConfig) -> Result<Self, String> {
        let open = |entry: &crate::config::files::StaticDir| {
            Ok((entry.url.clone(), Arc::new(Beneath::open(&entry.directory, "--static")?)))
        };
        let mut statics = gateway.files.statics.iter().map(open).collect::<Result<Vec<_>, String>>()?;
        statics.sort_by_key(|(url, _)| std::cmp::Reverse(url.segments().count()));
        let sendfile = gateway.files.sendfile.iter().map(Allowed::open).collect::<Result<_, String>>()?;
        let index = gateway.scripts.index.as_ref().map(|index| index.trim_start_matches('/').as_bytes().to_vec());
        Ok(Self { statics, sendfile, index, threads: FileThreads::default() })
    }

    /// Removes the headers of a request that influence which file an application selects. Without `--sendfile`, a web
    /// server that sends CGI variables handles the selection itself, and may have set them.
    pub(super) fn remove_influence(&self, request: &mut Parts) {
        if self.is_left_to_web_server(request) {
            return;
        }
        sendfile::remove(&mut request.headers);
        if let Some(client) = request.extensions.get_mut::<ClientInfo>()
            && let Some(params) = sendfile::without(&client.params)
        {
            client.params = params;
        }
    }

    fn is_left_to_web_server(&self, request: &Parts) -> bool {
        self.sendfile.is_empty() && came_with_variables(request)
    }

    /// Returns the response for a static file, or `None` if the request is for the application.
    pub(super) async fn answer(&self, request: &Parts) -> Option<Response<GatewayBody>> {
        if self.statics.is_empty() {
            return None;
        }
        let path = UrlPath::parse(request.uri.path())?;
        let (url, directory, rest) =
            self.statics.iter().find_map(|(url, directory)| Some((url, directory, path.below(url)?)))?;
        let missing = || (!url.is_root()).then(|| refusal(StatusCode::NOT_FOUND));
        let mut relative = rest.relative();
        if !rest.can_be_static() || self.index.as_ref() == Some(&relative) {
            return missing();
        }
        if !matches!(request.method, Method::GET | Method::HEAD) {
            return (!url.is_root()).then(not_allowed);
        }
        if rest.ends_in_slash {
            relative = index_of(&relative);
        }
        let (accepted, reads) = (coding::accepted(&request.headers), may_need_all(request));
        let opened = Arc::clone(directory);
        let located = self.threads.run(move || locate(&opened, relative, &accepted, reads)).await;
        Some(match located.unwrap_or_else(|error| Err(OpenError::Failed(error))) {
            Ok(Located::File { content, name, varies }) => {
                let mut headers = HeaderMap::with_capacity(8);
                headers.insert(header::CONTENT_TYPE, content_type(&name));
                if let Some(coding) = content.coding {
                    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
                }
                if varies {
                    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
                }
                respond(request, content, StatusCode::OK, headers, &self.threads)
            }
            Ok(Located::Directory) => redirect(&path, request),
            Err(error) => {
                note(&error, "--static", &[directory.path(), b"/", &rest.relative()].concat(), request.uri.path());
                match failed(&error) {
                    StatusCode::NOT_FOUND => return missing(),
                    status => apologize(status),
                }
            }
        })
    }

    /// Replaces the response of an application that has selected a file. `what` describes the request in the log.
    pub(super) async fn send_selected(
        &self,
        request: &Parts,
        what: &str,
        mut response: Response<GatewayBody>,
    ) -> Response<GatewayBody> {
        if self.is_left_to_web_server(request) {
            return response;
        }
        let Some(selection) = sendfile::take(response.headers_mut()) else { return response };
        let (name, path) = (selection.header(), String::from_utf8_lossy(selection.value()).into_owned());
        if self.sendfile.is_empty() {
            log::warn!(path, request = what; "removed {name} from a response: no directory is allowed (--sendfile)");
            return response;
        }
        if has_no_body(response.status()) {
            return response;
        }
        // This discards the body, so the app process does not wait for the client.
        let (head, _) = response.into_parts();
        let Some((directory, relative)) = allowed::find(&self.sendfile, &selection) else {
            log::error!(path, request = what; "answered 404: {name} names no file {}", expectation(&selection));
            return refusal(StatusCode::NOT_FOUND);
        };
        let reads = may_need_all(request);
        let kind = content_type(&relative);
        let open = move || directory.open_file(&relative).map(|file| content(file, None, reads));
        let opened = self.threads.run(open).await;
        match opened.unwrap_or_else(|error| Err(OpenError::Failed(error))) {
            Ok(content) => {
                let headers = without_description(head.headers, kind);
                // The application cannot know the length of the file that is sent.
                let is_part = head.status == StatusCode::PARTIAL_CONTENT;
                let status = if is_part { StatusCode::OK } else { head.status };
                respond(request, content, status, headers, &self.threads)
            }
            Err(error) => {
                let status = failed(&error);
                log::error!(path, request = what; "answered {}: {name} names {} (--sendfile)", status.as_u16(), reason(&error));
                apologize(status)
            }
        }
    }
}

/// Whether the client may need all bytes of a file.
fn may_need_all(request: &Parts) -> bool {
    request.method != Method::HEAD && !conditions::are_given(&request.headers)
}

/// Returns the path of the index of a directory. A relative path does not begin with a slash.
fn index_of(directory: &[u8]) -> Vec<u8> {
    let slash: &[u8] = if directory.is_empty() { b"" } else { b"/" };
    [directory, slash, DIRECTORY_INDEX].concat()
}

/// Finds the file for a path below a static directory.
fn locate(
    directory: &Beneath,
    relative: Vec<u8>,
    accepted: &[Coding],
    reads_small: bool,
) -> Result<Located, OpenError> {
    let file = match directory.open_file(&relative) {
        Ok(file) => file,
        Err(OpenError::Directory) => {
            let has_index = directory.is_file(&index_of(&relative));
            return if has_index { Ok(Located::Directory) } else { Err(OpenError::NotFound) };
        }
        Err(error) => return Err(error),
    };
    let variant = |coding: Coding| [relative.as_slice(), coding.suffix().as_bytes()].concat();
    let varies = Coding::ALL.iter().any(|&coding| directory.is_file(&variant(coding)));
    let candidates = accepted.iter().filter(|_| varies);
    let best = { candidates }.find_map(|&coding| Some((coding, directory.open_file(&variant(coding)).ok()?)));
    let content = match best {
        Some((coding, file)) => content(file, Some(coding), reads_small),
        None => content(file, None, reads_small),
    };
    Ok(Located::File { content, name: relative, varies })
}

/// Reads a small file at once, because a second change of threads would cost more. If this fails, the file is read again
/// when it is sent.
fn content(file: OpenFile, coding: Option<Coding>, reads_small: bool) -> Content {
    let all = ByteRange { start: 0, end: file.version.length };
    let is_small = reads_small && all.length() <= body::PIECE;
    let bytes = if is_small { body::read(&file, all).ok() } else { None };
    Content { file, coding, bytes }
}

/// Returns the headers of an application's response for a file of this type.
fn without_description(mut headers: HeaderMap, kind: HeaderValue) -> HeaderMap {
    for name in [
        header::CONTENT_LENGTH,
        header::CONTENT_ENCODING,
        header::CONTENT_RANGE,
        header::TRANSFER_ENCODING,
        header::ETAG,
        header::LAST_MODIFIED,
        header::ACCEPT_RANGES,
    ] {
        headers.remove(name);
    }
    headers.entry(header::CONTENT_TYPE).or_insert(kind);
    headers
}

fn redirect(path: &UrlPath, request: &Parts) -> Response<GatewayBody> {
    let query = request.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let mut response = refusal(StatusCode::MOVED_PERMANENTLY);
    if let Ok(location) = HeaderValue::try_from(format!("{}{query}", path.as_directory())) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

fn not_allowed() -> Response<GatewayBody> {
    let mut response = refusal(StatusCode::METHOD_NOT_ALLOWED);
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    response
}

/// Returns the status for a file that cannot be opened.
fn failed(error: &OpenError) -> StatusCode {
    match error {
        OpenError::NotFound | OpenError::Directory | OpenError::Outside => StatusCode::NOT_FOUND,
        OpenError::Forbidden => StatusCode::FORBIDDEN,
        OpenError::Failed(error) => match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN) => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        },
    }
}

fn apologize(status: StatusCode) -> Response<GatewayBody> {
    if status == StatusCode::SERVICE_UNAVAILABLE { unavailable() } else { refusal(status) }
}

/// Logs an error that the operator can correct.
fn note(error: &OpenError, flag: &str, path: &[u8], url: &str) {
    let path = String::from_utf8_lossy(path);
    match error {
        OpenError::NotFound | OpenError::Directory => {}
        OpenError::Outside | OpenError::Forbidden => {
            log::warn!(path:%, url; "did not serve {} ({flag})", reason(error));
        }
        OpenError::Failed(_) => log::error!(path:%, url; "cannot serve a file: {} ({flag})", reason(error)),
    }
}

fn reason(error: &OpenError) -> String {
    let system = |error: &io::Error| sys::explain(error);
    match error {
        OpenError::NotFound => "no file".to_owned(),
        OpenError::Directory => "a directory".to_owned(),
        OpenError::Outside => "a path that leads out of its directory, through a symbolic link or ..".to_owned(),
        OpenError::Forbidden => "a file that the user of the gateways must not read".to_owned(),
        OpenError::Failed(error) => format!("a file that cannot be opened: {}", system(error)),
    }
}

/// Explains what an application may select.
fn expectation(selection: &Selection) -> &'static str {
    match selection {
        Selection::Path(_) => "in a directory of --sendfile (expected an absolute path)",
        Selection::Url(_) => "below a URL of --sendfile (expected the form --sendfile URL=DIR)",
    }
}
