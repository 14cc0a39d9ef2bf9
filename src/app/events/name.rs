//! Validates event names, for every publisher. No I/O.

/// Name of the event that notifies clients of missed events.
pub(crate) const GAP: &str = "gap";

/// Returns why the name is invalid, as a phrase whose subject is the name, or `None` if it is valid. An empty name is
/// valid.
pub(crate) fn fault(name: &str) -> Option<&'static str> {
    if name == GAP {
        Some("is reserved for notices of missed events")
    } else if name.contains(char::is_control) {
        Some("contains control characters") // the name is one line of an event stream
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_line_that_means_nothing_else() {
        for name in ["", "price", "Gap", "gap 2", "später", "a:b"] {
            assert_eq!(fault(name), None, "{name:?}");
        }
        for name in ["\n", "a\r", "\0", "\u{85}", "gap\n"] {
            assert_eq!(fault(name), Some("contains control characters"), "{name:?}");
        }
        assert!(fault(GAP).is_some());
    }
}
