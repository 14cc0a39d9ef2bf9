//! Compares a complete response with the expected response. Performs no I/O. The body is compared as it arrives and is not
//! stored.

use crate::response::End;
use crate::tally::{Fault, Kind};

/// The expected response.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expectation<'a> {
    /// The expected body, which is compared byte for byte.
    pub(crate) body: Option<&'a [u8]>,
    /// The expected length of the body, if only the length is checked.
    pub(crate) length: Option<u64>,
}

/// The part of one response's body that has been compared.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) length: u64,
    differs: bool,
}

impl Seen {
    /// Compares the next part of the body.
    pub(crate) fn pass(&mut self, part: &[u8], expectation: &Expectation<'_>) {
        if let Some(body) = expectation.body {
            let rest = usize::try_from(self.length).ok().and_then(|at| body.get(at..));
            self.differs |= !rest.is_some_and(|rest| rest.starts_with(part));
        }
        self.length += part.len() as u64;
    }
}

impl Expectation<'_> {
    pub(crate) fn judge(&self, end: &End, seen: &Seen) -> Result<(), Fault> {
        if let Some(protocol_status) = end.refused {
            return Err(Fault::new(Kind::Refused, format!("END_REQUEST with protocolStatus {protocol_status}")));
        }
        if end.status != 200 {
            return Err(Fault::new(Kind::Status, format!("{} instead of 200", end.status)));
        }
        let wanted = self.length.or(self.body.map(|body| body.len() as u64));
        match wanted {
            Some(wanted) if wanted != seen.length => {
                Err(Fault::new(Kind::Length, format!("a body of {} bytes instead of {wanted}", seen.length)))
            }
            _ if seen.differs => Err(Fault::new(Kind::Content, "a body that differs from the first")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: End = End { refused: None, status: 200, keep: true };

    /// Returns the outcome for a response with this body, which arrives in parts of any size.
    fn verdict(expectation: Expectation<'_>, end: End, body: &[u8]) -> Option<Kind> {
        let verdicts: Vec<Option<Kind>> = (1..=body.len().max(1))
            .map(|size| {
                let mut seen = Seen::default();
                body.chunks(size).for_each(|part| seen.pass(part, &expectation));
                expectation.judge(&end, &seen).err().map(|fault| fault.kind)
            })
            .collect();
        assert!(verdicts.iter().all(|verdict| *verdict == verdicts[0]), "{verdicts:?}");
        verdicts[0]
    }

    #[test]
    fn the_same_body() {
        let same = Expectation { body: Some(b"hello"), length: None };
        assert_eq!(verdict(same, GOOD, b"hello"), None);
        assert_eq!(verdict(same, GOOD, b"hellO"), Some(Kind::Content));
        assert_eq!(verdict(same, GOOD, b"Hello"), Some(Kind::Content));
        assert_eq!(verdict(same, GOOD, b"hell"), Some(Kind::Length));
        assert_eq!(verdict(same, GOOD, b"hello!"), Some(Kind::Length));
        assert_eq!(verdict(same, GOOD, b""), Some(Kind::Length));
    }

    #[test]
    fn any_body() {
        let any = Expectation { body: None, length: None };
        assert_eq!(verdict(any, GOOD, b"whatever"), None);
        let five = Expectation { body: None, length: Some(5) };
        assert_eq!(verdict(five, GOOD, b"HELLO"), None);
        assert_eq!(verdict(five, GOOD, b"HELL"), Some(Kind::Length));
    }

    #[test]
    fn status_comes_before_the_body() {
        let same = Expectation { body: Some(b"hello"), length: Some(5) };
        assert_eq!(verdict(same, End { status: 503, ..GOOD }, b"sorry"), Some(Kind::Status));
        assert_eq!(verdict(same, End { refused: Some(2), ..GOOD }, b""), Some(Kind::Refused));
    }
}
