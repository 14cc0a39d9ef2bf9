//! Decides what happens to a dead worker's connection, from its record in the journal, without a system call.
//!
//! | state of the connection | result for the peer |
//! |---|---|
//! | no request is in flight; the last input has not been examined | another worker reads that input again |
//! | requests whose responses have not begun to be sent | a 502 for each |
//! | a response has been sent in part | the connection ends before the end of the response |
//! | all responses have been sent, and the connection is kept alive | another worker |
//! | as above, but a part of the next request has been read and is lost | a 502 over HTTP and SCGI |
//! | the output ends within a protocol record | the connection is reset |
//! | HTTP/2 | GOAWAY |
//!
//! After a 502 an HTTP or SCGI connection is closed. A FastCGI connection passes to another worker if it is kept alive and its input
//! ends at a record boundary.

use bytes::BytesMut;
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::journal::{ConnRecord, RequestRecord, WireProtocol};
use crate::protocol::cgi;
use crate::protocol::fastcgi::{self, FastCgiDecoder, FastCgiEvent};

/// The response body for a request whose worker died.
const BAD_GATEWAY: &[u8] = b"502 Bad Gateway\n";
/// HTTP/2 GOAWAY with INTERNAL_ERROR (RFC 9113, section 6.8). Its last stream id covers all streams, because any stream
/// may have had an effect.
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 2];

/// The decision about a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settlement {
    /// Bytes to write first.
    pub(crate) say: BytesMut,
    pub(crate) then: FinalStep,
    /// Number of requests that are answered with 502.
    pub(crate) answered: u32,
    /// Number of requests whose response is cut short, or whose state is unknown.
    pub(crate) cut: u32,
}

/// The final step for a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FinalStep {
    /// Pass the connection to another worker, with these bytes of input.
    PassOn(Vec<u8>),
    /// Close the connection when the peer has read the output.
    Close,
    /// Reset the connection.
    Reset,
}

pub(crate) fn settle(record: &ConnRecord) -> Settlement {
    let mut settlement = Settlement { say: BytesMut::new(), then: FinalStep::Reset, answered: 0, cut: 0 };
    let is_open = |request: &&RequestRecord| !has_left(record, request);
    let open: Vec<&RequestRecord> = record.requests.iter().filter(is_open).collect();
    let (begun, waiting): (Vec<&RequestRecord>, Vec<&RequestRecord>) =
        open.iter().partition(|request| request.from.is_some_and(|from| is_beyond(record.written, from)));
    let at_border = record.written == record.queued || record.written == record.batch;
    if !at_border {
        settlement.cut = count(open.len());
        return settlement;
    }
    let input = input(record);
    let unseen = if let Input::Looked { unseen, .. } = &input { unseen.as_slice() } else { &[] };
    settlement.cut = count(begun.len()) + u32::from(record.overflow);
    settlement.answered = count(waiting.len() + unseen.len());
    for request in waiting.iter().copied().chain(unseen) {
        write_bad_gateway(&mut settlement.say, record.wire_protocol, request);
    }
    settlement.then = match record.wire_protocol {
        WireProtocol::FastCgi if settlement.cut > 0 => {
            fastcgi::break_off(&mut settlement.say);
            FinalStep::Close
        }
        WireProtocol::FastCgi => go_on(record, &input),
        WireProtocol::Scgi | WireProtocol::Http1 if !begun.is_empty() => FinalStep::Reset,
        WireProtocol::Scgi | WireProtocol::Http1 if !waiting.is_empty() => FinalStep::Close,
        WireProtocol::Scgi | WireProtocol::Http1 => match go_on(record, &input) {
            // A part of a request was read and is lost.
            FinalStep::Close if input == Input::Lost && !is_ending(record) && is_beyond(record.read, record.clean) => {
                let half = RequestRecord { id: 1, is_head: false, is_last: true, at: 0, from: None, to: None };
                write_bad_gateway(&mut settlement.say, record.wire_protocol, &half);
                settlement.answered = 1;
                FinalStep::Close
            }
            then => then,
        },
        WireProtocol::Http2 => {
            settlement.say.extend_from_slice(&GOAWAY);
            FinalStep::Close
        }
        WireProtocol::Nothing => FinalStep::Reset,
    };
    settlement
}

/// The state of the input that has been read.
#[derive(Debug, PartialEq, Eq)]
enum Input {
    /// All input belongs to known requests.
    Whole,
    /// The input ends with these bytes, which the worker has not examined.
    Early(Vec<u8>),
    /// Some requests in the last bytes read have an entry in the journal; those in `unseen` have none. `ends_whole` is
    /// true if the bytes end at a record boundary.
    Looked { unseen: Vec<RequestRecord>, ends_whole: bool },
    /// A part of the input is lost.
    Lost,
}

fn input(record: &ConnRecord) -> Input {
    if record.read == record.clean {
        return Input::Whole;
    }
    let Some((_, bytes)) = record.landed.as_ref().filter(|(base, _)| *base == record.clean) else { return Input::Lost };
    if !record.requests.iter().any(|request| request.at == record.read) {
        return Input::Early(bytes.clone());
    }
    match record.wire_protocol {
        WireProtocol::FastCgi => examined(record, bytes),
        WireProtocol::Scgi | WireProtocol::Http1 | WireProtocol::Http2 | WireProtocol::Nothing => Input::Lost,
    }
}

/// Decodes input whose requests the worker had begun to enter in the journal, but possibly not all of them.
fn examined(record: &ConnRecord, bytes: &[u8]) -> Input {
    let mut decoder = FastCgiDecoder::new(bytes.len(), usize::from(u16::MAX));
    let mut rest = BytesMut::from(bytes);
    let mut found = Vec::new();
    loop {
        match decoder.decode(&mut rest) {
            Ok(Some(
                FastCgiEvent::Request { id, keep_connection, .. }
                | FastCgiEvent::BadRequest { id, keep_connection, .. },
            )) => {
                found.push((id, keep_connection));
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(_) => return Input::Lost,
        }
    }
    found.extend(decoder.assembled());
    let ends_whole = rest.is_empty() && decoder.is_between_records();
    let is_known = |id| record.requests.iter().any(|request| request.id == id && request.at == record.read);
    let request = |(id, keep): (u16, bool)| RequestRecord {
        id,
        is_head: false,
        is_last: !keep,
        at: record.read,
        from: None,
        to: None,
    };
    let unseen = found.into_iter().filter(|&(id, _)| !is_known(id)).map(request).collect();
    Input::Looked { unseen, ends_whole }
}

fn go_on(record: &ConnRecord, input: &Input) -> FinalStep {
    if is_ending(record) {
        return FinalStep::Close;
    }
    match input {
        Input::Whole => FinalStep::PassOn(Vec::new()),
        Input::Early(bytes) => FinalStep::PassOn(bytes.clone()),
        Input::Looked { unseen, ends_whole: true } if unseen.iter().all(|request| !request.is_last) => {
            FinalStep::PassOn(Vec::new())
        }
        Input::Looked { .. } | Input::Lost => FinalStep::Close,
    }
}

/// Whether the connection is to be closed after one of its requests.
fn is_ending(record: &ConnRecord) -> bool {
    record.requests.iter().any(|request| request.is_last)
}

/// Whether the response has been sent completely.
fn has_left(record: &ConnRecord, request: &RequestRecord) -> bool {
    let whole = record.wire_protocol != WireProtocol::Http1 || record.written == record.queued;
    whole && request.to.is_some_and(|to| !is_beyond(to, record.written))
}

/// Whether `position` comes after `other`. Positions wrap around.
fn is_beyond(position: u32, other: u32) -> bool {
    position.wrapping_sub(other).cast_signed() > 0
}

fn write_bad_gateway(say: &mut BytesMut, wire_protocol: WireProtocol, request: &RequestRecord) {
    let (status, length) = (StatusCode::BAD_GATEWAY, Some(BAD_GATEWAY.len() as u64));
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    let mut text = BytesMut::new();
    match wire_protocol {
        WireProtocol::Http1 => {
            text.extend_from_slice(b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/plain\r\nconnection: close\r\n");
            text.extend_from_slice(format!("content-length: {}\r\n\r\n", BAD_GATEWAY.len()).as_bytes());
        }
        WireProtocol::FastCgi | WireProtocol::Scgi => cgi::response_head(&mut text, status, &headers, length),
        WireProtocol::Http2 | WireProtocol::Nothing => return,
    }
    if !request.is_head {
        text.extend_from_slice(BAD_GATEWAY);
    }
    if wire_protocol == WireProtocol::FastCgi {
        fastcgi::stdout_header(say, request.id, text.len());
        say.extend_from_slice(&text);
        fastcgi::stdout_end(say, request.id, 0);
    } else {
        say.extend_from_slice(&text);
    }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::handover::PackedOrigin;

    /// Returns a kept-alive connection on which all requests so far are complete.
    fn idle(wire_protocol: WireProtocol) -> ConnRecord {
        ConnRecord {
            wire_protocol,
            listener: 0,
            read: 100,
            clean: 100,
            written: 50,
            batch: 0,
            queued: 50,
            overflow: false,
            origin: PackedOrigin::default(),
            requests: Vec::new(),
            landed: None,
        }
    }

    fn request() -> RequestRecord {
        RequestRecord { id: 1, is_head: false, is_last: false, at: 100, from: None, to: None }
    }

    #[test]
    fn an_idle_connection_goes_on() {
        for wire_protocol in [WireProtocol::FastCgi, WireProtocol::Scgi, WireProtocol::Http1] {
            let settled = settle(&idle(wire_protocol));
            assert_eq!((settled.then, settled.answered, settled.say.len()), (FinalStep::PassOn(Vec::new()), 0, 0));
            let mut answered = idle(wire_protocol);
            answered.requests = vec![RequestRecord { from: Some(10), to: Some(50), ..request() }];
            assert_eq!(settle(&answered).then, FinalStep::PassOn(Vec::new()));
            answered.requests[0].is_last = true;
            assert_eq!(settle(&answered).then, FinalStep::Close, "the peer waits for that");
        }
    }

    #[test]
    fn what_was_read_and_not_looked_at_is_read_again() {
        for wire_protocol in [WireProtocol::FastCgi, WireProtocol::Scgi, WireProtocol::Http1] {
            let mut record = idle(wire_protocol);
            (record.read, record.landed) = (103, Some((100, b"abc".to_vec())));
            assert_eq!(settle(&record).then, FinalStep::PassOn(b"abc".to_vec()));
            record.landed = Some((101, b"bc".to_vec()));
            let settled = settle(&record);
            assert_eq!(settled.then, FinalStep::Close, "its beginning is lost");
            assert_eq!(settled.answered, u32::from(wire_protocol != WireProtocol::FastCgi));
            record.requests = vec![RequestRecord { from: Some(10), to: Some(50), ..request() }];
            let settled = settle(&record);
            assert_eq!(
                (settled.then, settled.answered),
                (FinalStep::Close, u32::from(wire_protocol != WireProtocol::FastCgi))
            );
            (record.landed, record.requests) =
                (Some((100, b"abc".to_vec())), vec![RequestRecord { at: 103, ..request() }]);
            let settled = settle(&record);
            assert_eq!((settled.then, settled.answered), (FinalStep::Close, 1), "the application may have seen it");
        }
    }

    #[test]
    fn of_several_requests_in_one_read_each_is_known_or_found() {
        let request_of = |id: u8| -> Vec<u8> {
            let begin = [1, 1, 0, id, 0, 8, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0];
            [&begin[..], &[1, 4, 0, id, 0, 0, 0, 0, 1, 5, 0, id, 0, 0, 0, 0]].concat()
        };
        let bytes = [request_of(1), request_of(2)].concat();
        let mut record = idle(WireProtocol::FastCgi);
        let read = 100 + u32::try_from(bytes.len()).unwrap();
        (record.read, record.landed) = (read, Some((100, bytes)));
        record.requests = vec![RequestRecord { at: read, ..request() }];
        let settled = settle(&record);
        assert_eq!((settled.answered, settled.then), (2, FinalStep::PassOn(Vec::new())));
        record.landed.as_mut().unwrap().1.pop(); // the last record is incomplete
        let settled = settle(&record);
        assert_eq!((settled.answered, settled.then), (2, FinalStep::Close));
    }

    #[test]
    fn a_request_of_whose_response_nothing_has_left_gets_a_502() {
        let mut record = idle(WireProtocol::FastCgi);
        record.requests =
            vec![request(), RequestRecord { id: 2, is_head: true, from: Some(50), to: Some(90), ..request() }];
        let settled = settle(&record);
        assert_eq!((settled.answered, settled.cut, settled.then), (2, 0, FinalStep::PassOn(Vec::new())));
        let text = String::from_utf8_lossy(&settled.say).into_owned();
        assert_eq!(text.matches("Status: 502").count(), 2);
        assert_eq!(text.matches("502 Bad Gateway\n").count(), 1, "none for HEAD");
        for wire_protocol in [WireProtocol::Scgi, WireProtocol::Http1] {
            let settled = settle(&ConnRecord { wire_protocol, requests: vec![request()], ..record.clone() });
            assert_eq!((settled.answered, settled.then), (1, FinalStep::Close));
            assert!(String::from_utf8_lossy(&settled.say).contains("502 Bad Gateway"));
        }
    }

    #[test]
    fn a_response_of_which_a_part_has_left_breaks_off() {
        for wire_protocol in [WireProtocol::FastCgi, WireProtocol::Scgi, WireProtocol::Http1] {
            let mut record = idle(wire_protocol);
            record.requests = vec![RequestRecord { from: Some(20), ..request() }];
            let settled = settle(&record);
            assert_eq!((settled.answered, settled.cut), (0, 1));
            assert_eq!(
                settled.then,
                if wire_protocol == WireProtocol::FastCgi { FinalStep::Close } else { FinalStep::Reset }
            );
            (record.written, record.batch, record.queued) = (45, 40, 50);
            let settled = settle(&record);
            assert_eq!((settled.cut, settled.then, settled.say.len()), (1, FinalStep::Reset, 0), "within a record");
        }
    }

    #[test]
    fn an_http_response_has_left_when_the_last_write_is_whole() {
        let mut record = idle(WireProtocol::Http1);
        record.requests = vec![RequestRecord { from: Some(10), to: Some(41), ..request() }];
        assert_eq!(settle(&record).then, FinalStep::PassOn(Vec::new()));
        record.queued = 60;
        record.batch = 50;
        assert_eq!(settle(&record).then, FinalStep::Reset);
        (record.queued, record.requests[0].to) = (50, Some(51));
        assert_eq!(settle(&record).then, FinalStep::Reset, "its end has not been written");
    }

    #[test]
    fn positions_wrap_around() {
        let mut record = idle(WireProtocol::FastCgi);
        (record.written, record.queued) = (5, 5);
        record.requests = vec![RequestRecord { from: Some(u32::MAX - 9), to: Some(5), ..request() }];
        assert_eq!(settle(&record).then, FinalStep::PassOn(Vec::new()));
        record.requests[0].to = Some(6);
        assert_eq!(settle(&record).cut, 1);
    }

    #[test]
    fn http2_is_told_that_it_ends() {
        let settled = settle(&idle(WireProtocol::Http2));
        assert_eq!((settled.say.len(), settled.then), (17, FinalStep::Close));
    }
}
