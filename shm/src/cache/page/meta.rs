//! Encodes a page without its body.
//!
//! ```text
//! version  u8       1
//! status   number
//! length   number   of the body before the cache compressed it; 0 if it did not
//! headers  number   count; then for each header:
//!          number   length of the name     name
//!          number   length of the value    value
//! ```
//! A number is stored in groups of seven bits, least significant first; every byte but the last has its highest bit set. Each number,
//! and therefore each page, has exactly one encoding.
//!
//! The bytes may have been written by any process. Whatever they contain, decoding allocates at most a multiple of their length.

use super::{CorruptPage, Header, Page, fields};

const VERSION: u8 = 1;
/// Minimum size of an encoded header in bytes: two lengths, and one byte of a name.
const HEADER_MIN: usize = 3;

impl Page {
    /// Encodes the page without its body and without headers that must not be stored.
    pub(crate) fn encode_meta(&self) -> Vec<u8> {
        let options = fields::connection_options(&self.headers);
        let kept = || self.headers.iter().filter(|(name, _)| !fields::is_passing(name, &options));
        let size = kept().map(|(name, value)| name.len() + value.len() + 4).sum::<usize>() + 16;
        let mut meta = Vec::with_capacity(size);
        meta.push(VERSION);
        put_number(&mut meta, u64::from(self.status));
        put_number(&mut meta, self.plain_len.unwrap_or(0));
        put_number(&mut meta, kept().count() as u64);
        for (name, value) in kept() {
            for bytes in [name, value] {
                put_number(&mut meta, bytes.len() as u64);
                meta.extend_from_slice(bytes);
            }
        }
        meta
    }

    /// Decodes the page that was stored as `meta` and `body`. Does not examine the body.
    ///
    /// # Errors
    /// Fails if `meta` is not the output of [`Page::encode_meta`] for a page that can be sent.
    pub(crate) fn decode(meta: &[u8], body: Vec<u8>) -> Result<Page, CorruptPage> {
        let damaged = |why| CorruptPage::Meta { why };
        let (&version, mut rest) = meta.split_first().ok_or(damaged("there are none"))?;
        if version != VERSION {
            return Err(damaged("another version of this program wrote them"));
        }
        let rest = &mut rest;
        let (status, plain_len, headers) = read(rest).ok_or(damaged("they end early, or claim too much"))?;
        if !rest.is_empty() {
            return Err(damaged("something follows them"));
        }
        if !(100..=999).contains(&status) {
            return Err(damaged("the status is none"));
        }
        if !headers.iter().all(fields::is_sound) {
            return Err(damaged("a header is none"));
        }
        if headers.iter().any(|(name, _)| fields::is_passing(name, &[])) {
            return Err(damaged("a header is not one of a page"));
        }
        let plain_len = (plain_len > 0).then_some(plain_len);
        if plain_len.is_some_and(|plain_len| plain_len <= body.len() as u64) {
            return Err(damaged("compressing did not make the body smaller"));
        }
        Ok(Page { status, headers, body, plain_len })
    }
}

fn read(rest: &mut &[u8]) -> Option<(u16, u64, Vec<Header>)> {
    let status = u16::try_from(take_number(rest)?).ok()?;
    let plain_len = take_number(rest)?;
    let count = usize::try_from(take_number(rest)?).ok().filter(|&count| count <= rest.len() / HEADER_MIN)?;
    let mut headers = Vec::with_capacity(count);
    for _ in 0..count {
        headers.push((take_bytes(rest)?, take_bytes(rest)?));
    }
    Some((status, plain_len, headers))
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    loop {
        let [low, ..] = number.to_le_bytes();
        number >>= 7;
        if number == 0 {
            return out.push(low & 0x7f);
        }
        out.push(low | 0x80);
    }
}

fn take_number(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None; // more than 64 bits
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            // A final byte of zero is redundant, and is rejected to keep the encoding unique.
            return (byte != 0 || shift == 0).then_some(number);
        }
    }
    None
}

fn take_bytes(rest: &mut &[u8]) -> Option<Vec<u8>> {
    let len = usize::try_from(take_number(rest)?).ok()?;
    let (bytes, after) = rest.split_at_checked(len)?;
    *rest = after;
    Some(bytes.to_vec())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Generates any storable page. Its body may or may not be compressible.
    fn page() -> impl Strategy<Value = Page> {
        let name = "[a-z0-9!#_~-]{1,40}".prop_map(|name| format!("x-{name}"));
        let value = vec(prop_oneof![Just(b'\t'), b' '..=0x7e, 0x80..=0xffu8], 0..300);
        let body = (vec(any::<u8>(), 0..300), 0..30usize).prop_map(|(piece, times)| piece.repeat(times));
        (100..=999u16, vec((name, value), 0..20), body, any::<bool>()).prop_map(|(status, headers, body, gzip)| {
            let headers = headers.iter();
            let page = headers.fold(Page::new(body).status(status), |page, (name, value)| page.header(name, value));
            if gzip { page.gzip() } else { page }
        })
    }

    proptest! {
        #[test]
        fn what_is_kept_comes_back(page in page()) {
            let meta = page.encode_meta();
            prop_assert_eq!(Page::decode(&meta, page.body.clone()).unwrap(), page);
        }

        #[test]
        fn what_is_cut_or_longer_is_refused(page in page(), cut in any::<prop::sample::Index>(), more: u8) {
            let mut meta = page.encode_meta();
            prop_assert!(Page::decode(&meta[..cut.index(meta.len())], page.body.clone()).is_err());
            meta.push(more);
            prop_assert!(Page::decode(&meta, page.body).is_err());
        }

        #[test]
        fn any_bytes_are_a_page_or_an_error(meta in vec(any::<u8>(), 0..200), body in vec(any::<u8>(), 0..100)) {
            let meta = [&[VERSION], &meta[..]].concat();
            if let Ok(page) = Page::decode(&meta, body) {
                prop_assert!(page.encode_meta().len() <= meta.len());
                prop_assert!(page.headers.iter().all(fields::is_sound));
                let _ = page.negotiate(None);
            }
        }

        #[test]
        fn a_changed_byte_gives_a_sound_page_or_an_error(
            page in page(), at in any::<prop::sample::Index>(), bits in 1..=255u8,
        ) {
            let mut meta = page.encode_meta();
            let at = at.index(meta.len());
            meta[at] ^= bits;
            if let Ok(changed) = Page::decode(&meta, page.body.clone()) {
                prop_assert!(changed != page, "byte {} means nothing", at);
                prop_assert!(changed.headers.iter().all(fields::is_sound));
                let plain_len = changed.plain_len;
                if let Ok(plain) = changed.into_plain() {
                    prop_assert!(plain_len.is_none_or(|len| plain.body.len() as u64 == len));
                }
            }
        }

        #[test]
        fn numbers_come_back(number: u64, shift in 0..64u32) {
            let mut bytes = Vec::new();
            put_number(&mut bytes, number >> shift);
            prop_assert_eq!(take_number(&mut bytes.as_slice()), Some(number >> shift));
        }
    }

    #[test]
    fn headers_of_one_connection_are_not_kept() {
        let page = Page::new("12345")
            .header("Content-Length", "99")
            .header("Connection", "X-Hop")
            .header("X-Hop", "1")
            .header("Proxy-Authenticate", "Basic")
            .header("Transfer-Encoding", "chunked")
            .header("ETag", "\"1\"");
        let kept = Page::decode(&page.encode_meta(), page.body().to_vec()).unwrap();
        assert_eq!(kept, Page::new("12345").header("ETag", "\"1\""));
    }

    #[test]
    fn the_bytes_are_these() {
        let page = Page::new(vec![0; 3000]).status(404).header("A", "bc");
        assert_eq!(page.encode_meta(), b"\x01\x94\x03\x00\x01\x01a\x02bc");
        assert_eq!(page.gzip().encode_meta(), b"\x01\x94\x03\xb8\x17\x01\x01a\x02bc");
    }

    #[test]
    fn claims_are_checked_before_anything_is_made_of_them() {
        let why = |meta: &[u8]| match Page::decode(meta, vec![0; 10]) {
            Err(CorruptPage::Meta { why }) => why,
            other => panic!("{other:?}"),
        };
        let most = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        let early = "they end early, or claim too much";
        assert_eq!(why(b""), "there are none");
        assert_eq!(why(b"\x02\xc8\x01\x00\x00"), "another version of this program wrote them");
        assert_eq!(why(&[b"\x01\xc8\x01\x00", &most[..], b"\x01a\x00"].concat()), early, "headers");
        assert_eq!(why(&[b"\x01\xc8\x01\x00\x01", &most[..], b"a\x00"].concat()), early, "length of a name");
        assert_eq!(why(b"\x01\xc8\x01\x00\x80\x00"), early, "a number written in two ways");
        assert_eq!(why(&[b"\x01\xc8\x01", &[0xff; 9][..], b"\x03\x00"].concat()), early, "more than 64 bits");
        assert_eq!(why(b"\x01\x63\x00\x00"), "the status is none");
        assert_eq!(why(b"\x01\xc8\x01\x00\x01\x01A\x00"), "a header is none");
        assert_eq!(why(b"\x01\xc8\x01\x00\x01\x01a\x01\n"), "a header is none");
        assert_eq!(why(b"\x01\xc8\x01\x00\x01\x02te\x01x"), "a header is not one of a page");
        assert_eq!(why(b"\x01\xc8\x01\x0a\x00"), "compressing did not make the body smaller");
        assert_eq!(why(b"\x01\xc8\x01\x00\x00\x00"), "something follows them");
        assert!(Page::decode(&[b"\x01\xc8\x01", &most[..], b"\x00"].concat(), vec![0; 10]).is_ok());
    }
}
