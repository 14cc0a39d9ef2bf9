//! Checks the properties of a page that must hold for any content of the shared memory and any request. `docs/fuzzing.md` in the Forkyard
//! repository describes them. Compiled only for tests and with `--cfg fuzzing`.

use crate::cache::page::{Encoding, Page};

/// Interprets the first byte of `data` as the length of a body, the first line as `Accept-Encoding`, and the rest as the stored
/// metadata and as `If-None-Match`.
///
/// # Panics
/// Panics if a decoded page does not encode to the same bytes, or if what is sent is inconsistent.
pub fn page(data: &[u8]) {
    let Some((&length, rest)) = data.split_first() else { return };
    let at = rest.iter().position(|&byte| byte == b'\n').unwrap_or(0);
    let (accept, rest) = rest.split_at(at);
    let rest = rest.strip_prefix(b"\n").unwrap_or(rest);

    if let Ok(page) = Page::decode(rest, vec![b'x'; length.into()]) {
        assert_eq!(page.encode_meta(), rest, "a page is written in one way only");
        let is_compressed = page.encoding() != Encoding::Identity;
        // Fails if the body, which is not valid gzip, has to be decompressed.
        if let Ok(sent) = page.negotiate(Some(accept)) {
            assert_eq!(sent.encoding(), Encoding::Identity, "nothing is left to negotiate");
            assert!(!is_compressed || sent.value("content-encoding").is_some() && sent.value("vary").is_some());
            let again = sent.clone().negotiate(None);
            assert_eq!(again.as_ref().ok(), Some(&sent), "what is sent is sent again as it is");
            let not_modified = sent.not_modified(None);
            assert!(not_modified.status_code() == 304 && not_modified.body().is_empty());
        }
    }

    let page = Page::new("body").header("etag", "W/\"a\"");
    assert!(page.matches(b"*") && page.matches(b"\"a\"") && !page.matches(b"\"b\""));
    // Tags are quoted, so text without quotes can only match as `*`.
    if !rest.contains(&b'"') && page.matches(rest) {
        assert_eq!(rest.trim_ascii(), b"*", "a tag is in quotes");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    #[test]
    fn every_seed_and_each_of_its_beginnings_holds() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/page");
        let seeds: Vec<_> =
            fs::read_dir(directory).unwrap().map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
        assert!(!seeds.is_empty());
        for seed in seeds {
            (0..=seed.len()).for_each(|end| super::page(&seed[..end]));
        }
    }
}
