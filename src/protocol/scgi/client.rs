//! Encodes an SCGI request, from the side of the web server.

use bytes::{BufMut as _, BytesMut};

/// Appends the variables of a request, as a netstring. The body, of this length, must follow.
///
/// `CONTENT_LENGTH` and `SCGI` come first, and replace variables of these names. A pair that the format cannot express is
/// left out: one with a null byte, or without a name.
pub(crate) fn request(out: &mut BytesMut, length: u64, variables: impl FnOnce(&mut dyn FnMut(&[u8], &[u8]))) {
    let mut strings = BytesMut::with_capacity(1024);
    put(&mut strings, b"CONTENT_LENGTH", itoa::Buffer::new().format(length).as_bytes());
    put(&mut strings, b"SCGI", b"1");
    variables(&mut |name, value| {
        let is_expressible = !name.is_empty() && ![name, value].concat().contains(&0);
        if is_expressible && !matches!(name, b"CONTENT_LENGTH" | b"SCGI") {
            put(&mut strings, name, value);
        }
    });
    out.put_slice(itoa::Buffer::new().format(strings.len()).as_bytes());
    out.put_u8(b':');
    out.put_slice(&strings);
    out.put_u8(b',');
}

fn put(strings: &mut BytesMut, name: &[u8], value: &[u8]) {
    for text in [name, value] {
        strings.put_slice(text);
        strings.put_u8(0);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ScgiDecoder, ScgiEvent};
    use super::*;

    #[test]
    fn the_request_of_the_specification_is_written() {
        let mut out = BytesMut::new();
        request(&mut out, 27, |pair| {
            pair(b"REQUEST_METHOD", b"POST");
            pair(b"REQUEST_URI", b"/deepthought");
        });
        let expected = b"70:CONTENT_LENGTH\x0027\0SCGI\x001\0REQUEST_METHOD\0POST\0REQUEST_URI\0/deepthought\0,";
        assert_eq!(out, expected[..]);
    }

    #[test]
    fn a_server_reads_the_variables_once_each() {
        let mut out = BytesMut::new();
        request(&mut out, 5, |pair| {
            for (name, value) in
                [("A", "1"), ("CONTENT_LENGTH", "7"), ("SCGI", "2"), ("", "x"), ("B", "a\0b"), ("C", "")]
            {
                pair(name.as_bytes(), value.as_bytes());
            }
        });
        out.extend_from_slice(b"hello");
        let mut decoder = ScgiDecoder::new(4096);
        let Ok(Some(ScgiEvent::Request { params, length: Some(5) })) = decoder.decode(&mut out) else {
            panic!("{out:?}")
        };
        let pairs: Vec<_> = params.iter().map(|(name, value)| [name, b"=", value].concat()).collect();
        assert_eq!(pairs, [&b"CONTENT_LENGTH=5"[..], b"SCGI=1", b"A=1", b"C="]);
        assert_eq!(decoder.decode(&mut out), Ok(Some(ScgiEvent::Body("hello".into()))));
    }
}
