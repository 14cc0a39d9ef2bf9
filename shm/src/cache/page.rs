//! A page as an HTTP response: status, headers, body, and whether the cache keeps the body compressed.
//!
//! ```text
//!   application ─▶ Page ─▶ gzip ─▶ storable? ─▶ meta::encode + body ─▶ entry
//!        client ◀─ negotiate ◀─ Page ◀─ meta::decode ◀─────────────────┘
//! ```
//!
//! The body is compressed once, when the page is stored. A client that accepts gzip is sent the stored bytes. For any other client, the
//! body is decompressed. In neither case is the page rendered again.
//!
//! - [`fields`] parses single header fields: pure functions on bytes.
//! - [`meta`] encodes everything but the body as bytes, and decodes those bytes without trusting them.
//! - [`serve`] determines which pages may be stored, and what is sent to a client.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

mod fields;
mod meta;
mod serve;

use std::fmt;
use std::io::{Read as _, Write as _};

use flate2::Compression;
use flate2::bufread::GzDecoder;
use flate2::write::GzEncoder;

pub use self::serve::NotStorable;

/// Bodies of up to this length, in bytes, are not compressed, because compression would save at most one or two network packets.
const GZIP_MIN: usize = 1024;
/// Initial size of the buffer for a decompressed body, as a multiple of the compressed length. The buffer grows with the output instead of
/// being allocated with the recorded length, which may be incorrect.
const FIRST_ROOM: usize = 16;

/// A header: its name in lower case, and its value.
pub type Header = (Vec<u8>, Vec<u8>);

/// A response to be cached: status, headers in order, and body.
///
/// ```
/// use forkyard_shm::{Encoding, Page};
///
/// let page = Page::new("<h1>News</h1>\n".repeat(1000)).header("content-type", "text/html").gzip();
/// assert_eq!(page.encoding(), Encoding::Gzip);
/// assert!(page.body().len() < 1000);
///
/// let sent = page.clone().negotiate(Some(b"gzip, br"))?;
/// assert_eq!(sent.value("content-encoding"), Some(&b"gzip"[..]));
/// let sent = page.negotiate(Some(b"br"))?;
/// assert_eq!(sent.value("content-encoding"), None);
/// assert_eq!(sent.body().len(), 14_000);
/// # Ok::<(), forkyard_shm::CorruptPage>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Page {
    status: u16,
    headers: Vec<Header>,
    body: Vec<u8>,
    /// The length of the body before the cache compressed it; `None` if the cache did not compress it.
    plain_len: Option<u64>,
}

/// How the cache has encoded a body, in addition to any encoding that the page's headers declare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Not encoded by the cache. The body is as the headers describe it.
    Identity,
    /// Compressed by the cache with gzip. The headers do not declare this until [`Page::negotiate`].
    Gzip,
}

/// Why a stored page cannot be used. Treat it as a miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorruptPage {
    /// The stored metadata is invalid.
    Meta {
        /// What is wrong with the metadata.
        why: &'static str,
    },
    /// The stored compressed body is invalid.
    Body {
        /// What is wrong with the body.
        why: &'static str,
    },
}

impl fmt::Display for CorruptPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Meta { why } => write!(f, "the cached page's metadata are damaged: {why} (render the page again)"),
            Self::Body { why } => write!(f, "the cached page's body is damaged: {why} (render the page again)"),
        }
    }
}

impl std::error::Error for CorruptPage {}

impl Page {
    /// Creates a page with status 200 and no headers.
    pub fn new(body: impl Into<Vec<u8>>) -> Page {
        Page { status: 200, headers: Vec::new(), body: body.into(), plain_len: None }
    }

    /// Sets the status.
    #[must_use]
    pub fn status(mut self, status: u16) -> Page {
        self.status = status;
        self
    }

    /// Appends a header, even if the page already has one with this name.
    ///
    /// The name is stored in lower case. [`Page::storable`] rejects names and values that HTTP does not allow.
    #[must_use]
    pub fn header(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Page {
        self.headers.push((name.as_ref().to_ascii_lowercase(), value.as_ref().to_vec()));
        self
    }

    /// Returns the status code, such as 200.
    pub fn status_code(&self) -> u16 {
        self.status
    }

    /// Returns the headers in order, with lower-case names.
    pub fn headers(&self) -> &[Header] {
        &self.headers
    }

    /// Returns the value of the first header with this name. `name` must be in lower case.
    pub fn value(&self, name: &str) -> Option<&[u8]> {
        self.values(name).next()
    }

    /// Returns the values of all headers with this name. `name` must be in lower case.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.headers.iter().filter(move |(known, _)| known == name.as_bytes()).map(|(_, value)| value.as_slice())
    }

    /// Whether the cache has compressed the body. The headers do not declare this.
    pub fn encoding(&self) -> Encoding {
        if self.plain_len.is_some() { Encoding::Gzip } else { Encoding::Identity }
    }

    /// Returns the body as stored: see [`Page::encoding`].
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Splits the page into status, headers and body. Call [`negotiate`](Page::negotiate) first: until then, the headers do not declare
    /// that the body is compressed.
    pub fn into_parts(self) -> (u16, Vec<Header>, Vec<u8>) {
        (self.status, self.headers, self.body)
    }

    /// Compresses the body, if that is useful and allowed.
    ///
    /// The body is left unchanged if it has at most 1024 bytes, if compression does not make it smaller, or if its content type is already
    /// compressed. It is also left unchanged if there is a `Content-Encoding`, a `Content-Range`, or a digest of the exact bytes, or if
    /// `Cache-Control` contains `no-transform` (RFC 9111 §5.2.2.6).
    #[must_use]
    pub fn gzip(mut self) -> Page {
        if self.plain_len.is_some() || self.body.len() <= GZIP_MIN || fields::forbid_coding(&self.headers) {
            return self;
        }
        let mut encoder = GzEncoder::new(Vec::with_capacity(self.body.len() / 4), Compression::default());
        // Writing to memory cannot fail. If it did, the page would remain uncompressed.
        if encoder.write_all(&self.body).is_ok()
            && let Ok(compressed) = encoder.finish()
            && compressed.len() < self.body.len()
        {
            self.plain_len = Some(self.body.len() as u64);
            self.body = compressed;
            self.body.shrink_to_fit();
        }
        self
    }

    /// Decompresses the body. This is the inverse of [`Page::gzip`].
    ///
    /// # Errors
    /// Fails if the stored body is not valid gzip, or if it does not decompress to its original length. At most one byte beyond that length
    /// is decompressed.
    pub fn into_plain(mut self) -> Result<Page, CorruptPage> {
        if let Some(plain_len) = self.plain_len.take() {
            self.body = decompress(&self.body, plain_len)?;
        }
        Ok(self)
    }
}

fn decompress(body: &[u8], plain_len: u64) -> Result<Vec<u8>, CorruptPage> {
    let damaged = |why| CorruptPage::Body { why };
    let room = body.len().saturating_mul(FIRST_ROOM);
    let mut plain = Vec::with_capacity(usize::try_from(plain_len).map_or(room, |len| len.min(room)));
    // With the extra byte, the decoder reaches the end and verifies the checksum, or finds that the body is too long.
    let mut decoder = GzDecoder::new(body).take(plain_len.saturating_add(1));
    decoder.read_to_end(&mut plain).map_err(|_| damaged("it cannot be decompressed"))?;
    if plain.len() as u64 != plain_len {
        return Err(damaged("its length is not the one recorded"));
    }
    if !decoder.get_ref().get_ref().is_empty() {
        return Err(damaged("something follows it"));
    }
    Ok(plain)
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headers = self.headers.iter().map(|(name, value)| (name.escape_ascii(), value.escape_ascii()));
        f.debug_struct("Page")
            .field("status", &self.status)
            .field("headers", &headers.map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>())
            .field("body", &format_args!("{} bytes", self.body.len()))
            .field("plain_len", &self.plain_len)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> Vec<u8> {
        b"<li>one more line of a page</li>\n".repeat(200)
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(7);
        std::iter::repeat_with(|| random.u8(..)).take(len).collect()
    }

    #[test]
    fn a_page_keeps_its_headers_in_order_and_repeated() {
        let page = Page::new("x").status(404).header("Set-Cookie", "a=1").header("X", "y").header("set-cookie", "b=2");
        assert_eq!((page.status_code(), page.body(), page.encoding()), (404, &b"x"[..], Encoding::Identity));
        let names: Vec<&[u8]> = page.headers().iter().map(|(name, _)| name.as_slice()).collect();
        assert_eq!(names, [&b"set-cookie"[..], b"x", b"set-cookie"]);
        assert_eq!(page.values("set-cookie").collect::<Vec<_>>(), [b"a=1", b"b=2"]);
        assert_eq!(page.value("set-cookie"), Some(&b"a=1"[..]));
        assert_eq!(Page::new("").status_code(), 200);
    }

    #[test]
    fn a_body_is_compressed_once_and_comes_back() {
        let page = Page::new(text()).header("content-type", "text/html");
        let kept = page.clone().gzip();
        assert_eq!(kept.encoding(), Encoding::Gzip);
        assert!(kept.body().len() < text().len() / 10 && kept.body().starts_with(&[0x1f, 0x8b]));
        assert_eq!(kept.headers(), page.headers());
        assert_eq!(kept.clone().gzip(), kept, "twice is once");
        assert_eq!(kept.into_plain().unwrap(), page);
    }

    #[test]
    fn a_body_that_gains_nothing_stays_as_it_is() {
        let small = Page::new(vec![b' '; GZIP_MIN]);
        assert_eq!(small.clone().gzip(), small);
        assert_eq!(Page::new(vec![b' '; GZIP_MIN + 1]).gzip().encoding(), Encoding::Gzip);
        let random = Page::new(noise(5000));
        assert_eq!(random.clone().gzip(), random);
        assert_eq!(random.clone().into_plain().unwrap(), random);
    }

    #[test]
    fn headers_can_forbid_compression() {
        let encoding = |name: &str, value: &str| Page::new(text()).header(name, value).gzip().encoding();
        for (name, value) in [
            ("Content-Encoding", "br"),
            ("Content-Range", "bytes 0-9/10"),
            ("Content-Digest", "sha-256=:AA==:"),
            ("Cache-Control", "max-age=1, No-Transform"),
            ("Content-Type", "image/png"),
        ] {
            assert_eq!(encoding(name, value), Encoding::Identity, "{name}: {value}");
        }
        for (name, value) in [("Content-Language", "de"), ("Cache-Control", "public"), ("Content-Type", "text/css")] {
            assert_eq!(encoding(name, value), Encoding::Gzip, "{name}: {value}");
        }
    }

    #[test]
    fn no_more_comes_out_than_was_put_in() {
        const LEN: u64 = 8 << 20;
        let bomb = Page::new(vec![0; 8 << 20]).gzip();
        let cut = |plain_len| Page { plain_len: Some(plain_len), ..bomb.clone() }.into_plain();
        let wrong = CorruptPage::Body { why: "its length is not the one recorded" };
        for plain_len in [0, 5000, LEN - 1, LEN + 1, u64::MAX] {
            assert_eq!(cut(plain_len), Err(wrong), "{plain_len}");
        }
        assert_eq!(cut(LEN).unwrap().body().len() as u64, LEN);
        // Decompression stops at the length limit, before the truncated end of the input.
        assert_eq!(decompress(&bomb.body()[..bomb.body().len() / 2], 5000), Err(wrong));
    }

    #[test]
    fn a_body_that_changed_is_not_decompressed() {
        let kept = Page::new(text()).gzip();
        for at in 0..kept.body.len() {
            let mut bad = kept.clone();
            bad.body[at] ^= 0xff;
            // The first ten bytes contain a timestamp and an operating system code, which may differ.
            if let Ok(page) = bad.into_plain() {
                assert!(at < 10 && page.body == text(), "byte {at}");
            }
            let cut = Page { body: kept.body[..at].to_vec(), ..kept.clone() };
            assert!(cut.into_plain().is_err(), "cut at {at}");
        }
        let mut longer = kept.clone();
        longer.body.push(0);
        assert_eq!(longer.into_plain(), Err(CorruptPage::Body { why: "something follows it" }));
        let none = Page { body: text(), ..kept };
        assert_eq!(none.into_plain(), Err(CorruptPage::Body { why: "it cannot be decompressed" }));
    }

    #[test]
    fn messages_say_what_to_do() {
        let text = CorruptPage::Body { why: "it cannot be decompressed" }.to_string();
        assert_eq!(text, "the cached page's body is damaged: it cannot be decompressed (render the page again)");
        let page = Page::new("12345").header("x", [b'a', 0xff]);
        let shown = r#"Page { status: 200, headers: ["x: a\\xff"], body: 5 bytes, plain_len: None }"#;
        assert_eq!(format!("{page:?}"), shown);
    }
}
