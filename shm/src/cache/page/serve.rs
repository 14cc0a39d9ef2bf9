//! Determines which pages may be stored, and what is sent to a client. Section numbers refer to RFC 9110 unless RFC 9111 is named.

use std::fmt;

use super::{CorruptPage, Page, fields};

/// Headers that describe the body. A 304 response does not contain them (15.4.5).
const OF_THE_BODY: [&[u8]; 6] = [
    b"content-disposition",
    b"content-encoding",
    b"content-language",
    b"content-range",
    b"content-type",
    b"last-modified",
];

/// Why a page must not be stored in a shared cache. The request should not fail for this reason: the rendered page is still served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotStorable {
    /// The page sets a cookie, which would be sent to every client.
    SetCookie,
    /// `Cache-Control` contains `private`, for the whole page or for some headers (RFC 9111 §5.2.2.7).
    Private,
    /// `Cache-Control` contains `no-store` (RFC 9111 §5.2.2.5).
    NoStore,
    /// `Vary` contains `*`: the page is valid for one request only (RFC 9111 §4.1).
    VaryAll,
    /// The status does not belong to a complete page: it is not final, or it is 206 (partial content) or 304 (not modified).
    Status(u16),
    /// A header has a name or value that HTTP does not allow.
    Header,
}

impl fmt::Display for NotStorable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("page not cached: ")?;
        match self {
            Self::SetCookie => f.write_str("it sets a cookie, which is for one user (set it on another response)"),
            Self::Private => f.write_str("its Cache-Control says private (cache only what is for everybody)"),
            Self::NoStore => f.write_str("its Cache-Control says no-store"),
            Self::VaryAll => {
                f.write_str("its Vary says * (name the headers it depends on, and make them part of the key)")
            }
            Self::Status(status) => write!(f, "its status {status} is not that of a whole page"),
            Self::Header => {
                f.write_str("a header has a name or value that HTTP does not allow (is there a line break?)")
            }
        }
    }
}

impl std::error::Error for NotStorable {}

impl Page {
    /// Checks whether the page may be stored and served to other clients (RFC 9111 §3; the rule about cookies is stricter than §7.3 of that
    /// RFC).
    ///
    /// Two decisions are left to the caller. First, header fields listed in `Vary`, other than `*` and `Accept-Encoding`, must be part of
    /// the key. Second, only the caller can determine whether a page for a request with `Authorization` or cookies may be sent to everyone.
    /// `no-cache` does not prevent storing, because the application that stores a page also purges it.
    ///
    /// # Errors
    /// Returns the first reason why the page must not be stored.
    pub fn storable(&self) -> Result<(), NotStorable> {
        if !(200..=599).contains(&self.status) || matches!(self.status, 206 | 304) {
            return Err(NotStorable::Status(self.status));
        }
        if !self.headers.iter().all(fields::is_sound) {
            return Err(NotStorable::Header);
        }
        if self.value("set-cookie").is_some() {
            return Err(NotStorable::SetCookie);
        }
        if fields::has_directive(&self.headers, b"private") {
            return Err(NotStorable::Private);
        }
        if fields::has_directive(&self.headers, b"no-store") {
            return Err(NotStorable::NoStore);
        }
        if fields::elements(&self.headers, b"vary").any(|element| element == b"*") {
            return Err(NotStorable::VaryAll);
        }
        Ok(())
    }

    /// Prepares the page for a client with this `Accept-Encoding`. Join several fields with commas.
    ///
    /// If the client accepts gzip (§12.5.3: weights, `*`, `x-gzip`), a body that the cache compressed is sent unchanged, with
    /// `Content-Encoding: gzip`. Otherwise, the body is decompressed, even if the client sent no `Accept-Encoding`. `Vary` lists
    /// `Accept-Encoding` in both cases.
    ///
    /// With gzip, a strong `ETag` becomes weak, because the bytes differ (§8.8.3). A weak tag, unlike a tag with a suffix, matches in
    /// `If-None-Match` whichever encoding the client received. A tag without quotes is dropped, because it cannot be made weak.
    ///
    /// Connection-specific headers and `Content-Length` are dropped. Afterwards [`Page::encoding`] is
    /// [`Encoding::Identity`](super::Encoding::Identity).
    ///
    /// # Errors
    /// Fails if the body must be decompressed, but is corrupt.
    pub fn negotiate(mut self, accept_encoding: Option<&[u8]>) -> Result<Page, CorruptPage> {
        if self.negotiate_head(accept_encoding) {
            self.plain_len = None;
        }
        self.into_plain()
    }

    /// Whether a client that sent this `If-None-Match` already has the page (§13.1.2). Join several fields with commas. Use the result only
    /// for GET and HEAD.
    ///
    /// Always returns false for a page without an `ETag` or with a status that is not a success (§13.2.1).
    pub fn matches(&self, if_none_match: &[u8]) -> bool {
        let tag = self.value("etag").and_then(fields::tag);
        (200..=299).contains(&self.status) && tag.is_some_and(|tag| fields::names_tag(if_none_match, tag))
    }

    /// Creates the 304 response for a client that already has the page (§15.4.5). The response contains neither the body nor the headers
    /// that describe the body, but all other headers that [`Page::negotiate`] produces.
    #[must_use]
    pub fn not_modified(mut self, accept_encoding: Option<&[u8]>) -> Page {
        self.negotiate_head(accept_encoding);
        self.headers.retain(|(name, _)| !OF_THE_BODY.contains(&name.as_slice()));
        Page { status: 304, headers: self.headers, body: Vec::new(), plain_len: None }
    }

    /// Sets the headers for this client, and returns whether they declare the stored body to be gzip.
    fn negotiate_head(&mut self, accept_encoding: Option<&[u8]>) -> bool {
        let options = fields::connection_options(&self.headers);
        self.headers.retain(|(name, _)| !fields::is_passing(name, &options));
        if self.plain_len.is_none() {
            return false;
        }
        if !fields::lists(&self.headers, b"vary", b"accept-encoding") {
            match self.headers.iter_mut().find(|(name, value)| name == b"vary" && !value.trim_ascii().is_empty()) {
                Some((_, vary)) => vary.extend_from_slice(b", Accept-Encoding"),
                None => self.headers.push((b"vary".to_vec(), b"Accept-Encoding".to_vec())),
            }
        }
        // If the application added a coding after the compression, the stored gzip would be the inner coding. The application is
        // responsible for preventing this.
        if !accept_encoding.is_some_and(fields::accepts_gzip) || self.value("content-encoding").is_some() {
            return false;
        }
        self.headers.retain_mut(|(name, value)| name != b"etag" || weaken(value));
        self.headers.push((b"content-encoding".to_vec(), b"gzip".to_vec()));
        true
    }
}

/// Makes an entity tag weak. Returns `false` if `etag` is not a valid entity tag.
fn weaken(etag: &mut Vec<u8>) -> bool {
    let Some(tag) = fields::tag(etag) else { return false };
    *etag = [b"W/\"", tag, b"\""].concat();
    true
}

#[cfg(test)]
mod tests {
    use super::super::Encoding;
    use super::*;

    const GZIP: Option<&[u8]> = Some(b"gzip");

    fn plain() -> Page {
        Page::new(b"<li>one more line of a page</li>\n".repeat(200)).header("Content-Type", "text/html")
    }

    fn text<'p>(page: &'p Page, name: &str) -> Vec<&'p str> {
        page.values(name).map(|value| std::str::from_utf8(value).unwrap()).collect()
    }

    #[test]
    fn one_kept_body_serves_clients_with_and_without_gzip() {
        let kept = plain().header("ETag", "\"7\"").gzip();
        let compressed = kept.body().to_vec();

        let sent = kept.clone().negotiate(GZIP).unwrap();
        assert_eq!(sent.body(), compressed);
        assert_eq!(text(&sent, "content-encoding"), ["gzip"]);
        assert_eq!((text(&sent, "vary"), text(&sent, "etag")), (vec!["Accept-Encoding"], vec!["W/\"7\""]));
        assert_eq!(sent.encoding(), Encoding::Identity);
        assert_eq!(sent.clone().negotiate(None).unwrap(), sent, "nothing is left to negotiate");
        assert_eq!(sent.clone().gzip(), sent);

        for accept in [None, Some(&b"br"[..]), Some(b"gzip;q=0"), Some(b"")] {
            let sent = kept.clone().negotiate(accept).unwrap();
            assert_eq!(sent.body(), plain().body());
            assert_eq!(text(&sent, "content-encoding"), [""; 0]);
            assert_eq!((text(&sent, "vary"), text(&sent, "etag")), (vec!["Accept-Encoding"], vec!["\"7\""]));
        }
    }

    #[test]
    fn a_page_kept_plain_is_sent_as_it_is() {
        let page = plain().header("ETag", "\"7\"").header("Content-Encoding", "br").gzip();
        assert_eq!(page.clone().negotiate(GZIP).unwrap(), page);
    }

    #[test]
    fn vary_is_merged() {
        for (given, expected) in [
            (&["Cookie"][..], &["Cookie, Accept-Encoding"][..]),
            (&["accept-ENCODING"], &["accept-ENCODING"]),
            (&["*"], &["*"]),
            (&["Cookie", "X"], &["Cookie, Accept-Encoding", "X"]),
            (&["Cookie", "X, accept-encoding"], &["Cookie", "X, accept-encoding"]),
            (&[""], &["", "Accept-Encoding"]),
        ] {
            let page = given.iter().fold(plain(), |page, vary| page.header("Vary", vary)).gzip();
            for accept in [GZIP, None] {
                assert_eq!(text(&page.clone().negotiate(accept).unwrap(), "vary"), expected);
            }
        }
    }

    #[test]
    fn only_a_tag_is_made_weak() {
        for (given, expected) in [("\"a\"", &["W/\"a\""][..]), ("W/\"a\"", &["W/\"a\""]), ("a", &[])] {
            let page = plain().header("etag", given).gzip();
            assert_eq!(text(&page.clone().negotiate(GZIP).unwrap(), "etag"), expected);
            assert_eq!(text(&page.negotiate(None).unwrap(), "etag"), [given]);
        }
    }

    #[test]
    fn a_coding_named_after_the_compression_is_not_the_outer_one() {
        let sent = plain().gzip().header("Content-Encoding", "x-own").negotiate(GZIP).unwrap();
        assert_eq!((sent.body(), text(&sent, "content-encoding")), (plain().body(), vec!["x-own"]));
    }

    #[test]
    fn headers_of_one_connection_are_not_sent_again() {
        let page = plain().header("Connection", "x-hop").header("X-Hop", "1").header("Content-Length", "5");
        for page in [page.clone(), page.gzip()] {
            let sent = page.negotiate(None).unwrap();
            let names: Vec<_> = sent.headers().iter().map(|(name, _)| name.escape_ascii().to_string()).collect();
            assert_eq!(names.iter().filter(|name| *name != "vary").collect::<Vec<_>>(), ["content-type"]);
        }
    }

    #[test]
    fn a_damaged_body_is_an_error_where_it_is_needed() {
        let mut page = plain().gzip();
        page.body.truncate(20);
        assert!(page.clone().negotiate(None).is_err());
        assert_eq!(page.not_modified(None).status_code(), 304);
    }

    #[test]
    fn a_client_that_has_the_page_gets_a_304() {
        let page = plain().header("ETag", "\"7\"").header("Cache-Control", "max-age=5").gzip();
        assert!(page.matches(b"\"6\", W/\"7\"") && page.matches(b"*") && !page.matches(b"\"6\""));
        let sent = page.clone().not_modified(GZIP);
        assert_eq!((sent.status_code(), sent.body()), (304, &b""[..]));
        assert_eq!((text(&sent, "etag"), text(&sent, "vary")), (vec!["W/\"7\""], vec!["Accept-Encoding"]));
        assert_eq!(text(&sent, "cache-control"), ["max-age=5"]);
        assert_eq!((sent.value("content-type"), sent.value("content-encoding")), (None, None));
        assert_eq!(text(&page.clone().not_modified(None), "etag"), ["\"7\""]);
        assert!(!page.status(404).matches(b"\"7\""));
        assert!(!plain().matches(b"*") && !plain().header("etag", "7").matches(b"7"));
    }

    #[test]
    fn what_is_for_one_user_is_not_storable() {
        let with = |name: &str, value: &str| Page::new("").header(name, value).storable();
        assert_eq!(with("Set-Cookie", "a=1"), Err(NotStorable::SetCookie));
        assert_eq!(with("Cache-Control", "max-age=9, PRIVATE"), Err(NotStorable::Private));
        assert_eq!(with("Cache-Control", "private=\"x\""), Err(NotStorable::Private));
        assert_eq!(with("Cache-Control", "No-Store"), Err(NotStorable::NoStore));
        assert_eq!(with("Vary", "Accept, *"), Err(NotStorable::VaryAll));
        assert_eq!(with("X", "a\r\nb: c"), Err(NotStorable::Header));
        for status in [0, 100, 206, 304, 600] {
            assert_eq!(Page::new("").status(status).storable(), Err(NotStorable::Status(status)));
        }
        for status in [200, 301, 404, 503] {
            let page = Page::new("").status(status).header("Vary", "Accept").header("Cache-Control", "no-cache");
            assert_eq!(page.storable(), Ok(()));
        }
        assert!(NotStorable::Status(206).to_string().starts_with("page not cached: its status 206"));
    }
}
