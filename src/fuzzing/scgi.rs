//! Checks the SCGI decoder with arbitrary input, and with a valid request.

use bytes::BytesMut;

use super::{Dice, Pieces};
use crate::protocol::scgi::{ScgiDecoder, ScgiError, ScgiEvent};

/// A small limit, so that short inputs reach it.
const MAX_PARAMS: usize = 512;

/// Decodes arbitrary bytes twice: as a whole, and in pieces.
///
/// # Panics
/// Panics if the request, its body or the error differ, if the decoder holds more than the limit allows, or if a result
/// of `to_come` was wrong. The server relies on `to_come` when it leaves a request's last byte in the socket.
pub fn scgi(data: &[u8]) {
    let whole = receive(data, None);
    let cut = receive(data, Some(Pieces::of(data)));
    assert_eq!(whole, cut, "at once, and in pieces");
}

/// The events of one connection.
#[derive(Debug, Default, PartialEq, Eq)]
struct Transcript {
    pairs: Vec<u8>,
    length: Option<u64>,
    body: Vec<u8>,
    requests: u32,
    ends: u32,
    error: Option<ScgiError>,
    is_untouched: bool,
    ends_with_the_stream: bool,
}

impl Transcript {
    fn take(&mut self, event: ScgiEvent) {
        assert_eq!(self.ends, 0, "{event:?} behind the end");
        match event {
            ScgiEvent::Request { params, length } => {
                for part in params.iter().flat_map(|(name, value)| [name, value]) {
                    self.pairs.extend_from_slice(part);
                    self.pairs.push(0);
                }
                self.length = length;
                self.requests += 1;
            }
            ScgiEvent::Body(bytes) => {
                assert!(self.requests == 1 && !bytes.is_empty());
                self.body.extend_from_slice(&bytes);
                assert!(self.length.is_none_or(|length| self.body.len() as u64 <= length));
            }
            ScgiEvent::End => {
                assert_eq!((self.requests, self.length), (1, Some(self.body.len() as u64)));
                self.ends += 1;
            }
        }
    }
}

fn receive(data: &[u8], mut pieces: Option<Pieces>) -> Transcript {
    let (mut decoder, mut input) = (ScgiDecoder::new(MAX_PARAMS), BytesMut::new());
    let mut transcript = Transcript::default();
    // The results of `to_come`, each with the number of bytes that had been read.
    let mut promises: Vec<(usize, u64)> = Vec::new();
    let mut rest = data;
    while !rest.is_empty() && transcript.error.is_none() && transcript.ends == 0 {
        let piece = match &mut pieces {
            Some(pieces) => pieces.cut(&mut rest),
            None => std::mem::take(&mut rest),
        };
        input.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut input) {
                Ok(Some(event)) => transcript.take(event),
                Ok(None) => break,
                Err(error) => {
                    transcript.error = Some(error);
                    assert_eq!(decoder.to_come(input.len()), Some(0), "after an error nothing is awaited");
                    break;
                }
            }
        }
        assert!(transcript.error.is_some() || input.len() <= MAX_PARAMS, "{} bytes are left", input.len());
        if let Some(to_come) = decoder.to_come(input.len()) {
            let is_over = transcript.ends > 0 || transcript.error.is_some();
            assert_eq!(to_come == 0, is_over, "0 is the end");
            promises.push((data.len() - rest.len(), to_come));
        }
    }
    if let Some(&(end, 0)) = promises.last().filter(|_| transcript.ends > 0) {
        // The last piece may extend beyond the request. The end of the request is known exactly only if the last piece
        // was a single byte.
        let is_exact = promises.len() > 1 && promises.iter().rev().nth(1).is_some_and(|&(before, _)| before + 1 == end);
        for &(at, to_come) in &promises {
            let left = (end - at) as u64;
            assert!(to_come <= left, "{to_come} of {left}");
            assert!(!is_exact || (to_come == 1) == (left == 1), "{to_come} of {left}");
        }
    }
    transcript.is_untouched = decoder.is_untouched();
    transcript.ends_with_the_stream = decoder.ends_with_the_stream();
    transcript
}

/// Writes a request chosen by the bytes, and decodes it in pieces.
///
/// # Panics
/// Panics if the decoded request differs from the input.
pub fn scgi_script(data: &[u8]) {
    let mut dice = Dice(data);
    let has_length = !dice.coin(8);
    let version_at = dice.below(4);
    let body = dice.bytes();
    let mut strings = Vec::with_capacity(data.len() + 64);
    strings.extend_from_slice(b"CONTENT_LENGTH\0");
    strings.extend_from_slice(if has_length { body.len().to_string() } else { "-1".to_owned() }.as_bytes());
    strings.push(0);
    let mut number = 0;
    while !dice.is_empty() || number <= version_at {
        if number == version_at {
            strings.extend_from_slice(b"SCGI\x001\0");
        }
        number += 1;
        if !dice.is_empty() {
            // The first letter makes the name differ from CONTENT_LENGTH and SCGI, and from an empty name.
            strings.push(b'x');
            for string in [dice.bytes(), dice.bytes()] {
                strings.extend(string.iter().map(|&byte| byte.max(1)));
                strings.push(0);
            }
        }
    }
    let mut wire = strings.len().to_string().into_bytes();
    wire.push(b':');
    wire.extend_from_slice(&strings);
    wire.push(b',');
    wire.extend_from_slice(body);

    let limit = if data.len().is_multiple_of(2) { strings.len() } else { strings.len() - 1 };
    let (mut decoder, mut input) = (ScgiDecoder::new(limit), BytesMut::new());
    let (mut pieces, mut rest) = (Pieces::of(&wire), &wire[..]);
    let mut transcript = Transcript::default();
    while !rest.is_empty() {
        input.extend_from_slice(pieces.cut(&mut rest));
        loop {
            match decoder.decode(&mut input) {
                Ok(Some(event)) => transcript.take(event),
                Ok(None) => break,
                Err(error) => {
                    assert!(error == ScgiError::TooLong && limit < strings.len(), "{error}");
                    return;
                }
            }
        }
    }
    assert!(limit == strings.len() && transcript.pairs == strings && transcript.body == body);
    assert_eq!(transcript.length, has_length.then_some(body.len() as u64));
    assert_eq!((transcript.ends == 1, decoder.ends_with_the_stream()), (has_length, !has_length));
}
