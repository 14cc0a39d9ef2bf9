//! Decodes the status of the response that proves the readiness of an app process (`--ready-path`): over FastCGI, in CGI
//! form (SCGI), or over HTTP/1.0, whose head has the same form after a status line.

use bytes::{Bytes, BytesMut};
use http::StatusCode;

use super::cgi::parse_response::ResponseHeadParser;
use super::fastcgi::client::{ResponseDecoder, ResponseEvent};

/// The only request on a FastCGI connection.
pub(crate) const REQUEST_ID: u16 = 1;
/// Maximum size of the head of a response.
const MAX_HEAD: usize = 8 << 10;

/// Decodes the response.
#[derive(Debug)]
pub(crate) struct StatusDecoder {
    records: Option<(ResponseDecoder, BytesMut)>,
    head: ResponseHeadParser,
    status: Option<StatusCode>,
    has_ended: bool,
}

impl StatusDecoder {
    /// Creates a decoder. `is_fastcgi` is true if the response consists of FastCGI records.
    pub(crate) fn new(is_fastcgi: bool) -> Self {
        let records = is_fastcgi.then(|| (ResponseDecoder::new(REQUEST_ID), BytesMut::new()));
        Self { records, head: ResponseHeadParser::new(MAX_HEAD), status: None, has_ended: false }
    }

    /// Takes the next bytes of the response.
    ///
    /// # Errors
    /// Returns a message for the operator if the response is invalid.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Result<(), String> {
        let Some((mut decoder, mut input)) = self.records.take() else {
            return self.feed_head(Bytes::copy_from_slice(bytes));
        };
        input.extend_from_slice(bytes);
        while let Some(event) = decoder.decode(&mut input).map_err(|error| error.to_string())? {
            match event {
                ResponseEvent::Stdout(bytes) => self.feed_head(bytes)?,
                ResponseEvent::Stderr(_) => {}
                ResponseEvent::End { .. } => self.has_ended = true,
            }
        }
        self.records = Some((decoder, input));
        Ok(())
    }

    fn feed_head(&mut self, bytes: Bytes) -> Result<(), String> {
        if self.status.is_none() {
            let head = self.head.feed(bytes).map_err(|error| error.to_string())?;
            self.status = head.map(|(head, _)| head.status);
        }
        Ok(())
    }

    /// Returns the status, once the head of the response is complete.
    pub(crate) fn status(&self) -> Option<StatusCode> {
        self.status
    }

    /// Whether the response is complete before the end of the connection.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Returns the message for the operator if the connection has ended without a status.
    pub(crate) fn end_of_connection(&self) -> String {
        self.head.finish().to_string()
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut as _;

    use super::*;

    fn record(out: &mut BytesMut, kind: u8, content: &[u8]) {
        out.put_slice(&[1, kind, 0, 1, 0, u8::try_from(content.len()).unwrap(), 0, 0]);
        out.put_slice(content);
    }

    #[test]
    fn the_status_is_read_in_any_pieces() {
        let cgi = b"Status: 503 Busy\r\nContent-Type: text/plain\r\n\r\nno";
        let mut fastcgi = BytesMut::new();
        record(&mut fastcgi, 7, b"warning");
        record(&mut fastcgi, 6, &cgi[..20]);
        record(&mut fastcgi, 6, &cgi[20..]);
        record(&mut fastcgi, 3, &[0; 8]);
        for (is_fastcgi, bytes) in
            [(false, &b"HTTP/1.1 503 Busy\r\nServer: x\r\n\r\nno"[..]), (false, cgi), (true, &fastcgi)]
        {
            for size in 1..bytes.len() {
                let mut decoder = StatusDecoder::new(is_fastcgi);
                bytes.chunks(size).for_each(|piece| decoder.feed(piece).unwrap());
                assert_eq!(decoder.status(), Some(StatusCode::SERVICE_UNAVAILABLE), "{size}");
                assert_eq!(decoder.has_ended(), is_fastcgi);
            }
        }
    }

    #[test]
    fn an_invalid_response_is_explained() {
        for (is_fastcgi, bytes) in [(false, &b"220 mail\r\n\r\n"[..]), (true, b"HTTP/1.1 200 OK\r\n\r\n")] {
            let error = StatusDecoder::new(is_fastcgi).feed(bytes).unwrap_err();
            assert!(!error.is_empty());
        }
        let mut long = StatusDecoder::new(false);
        let error = (0..100).find_map(|_| long.feed(&[b'x'; 100]).err()).unwrap();
        assert!(error.contains("8K"), "{error}");
        assert!(StatusDecoder::new(false).end_of_connection().contains("without a response"));
    }
}
