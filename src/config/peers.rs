//! Sets of peers, given by `--allow`, `--trust` and `--proxy-protocol`. No I/O.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// One member of a set of peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerPattern {
    /// Every peer on a Unix socket.
    Unix,
    /// A network: the first `bits` bits of an address (RFC 4632).
    Network { address: IpAddr, bits: u32 },
}

/// A set of peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peers(Vec<PeerPattern>);

impl Peers {
    /// Creates a set of these peers. Returns `None` if `members` is empty, because a missing list is not the same as a
    /// set that contains no peer.
    pub(crate) fn new(members: Vec<PeerPattern>) -> Option<Self> {
        (!members.is_empty()).then_some(Self(members))
    }

    /// Returns the web servers that may connect to a FastCGI application, or `None` if `variable` is empty. `variable`
    /// is the value of `FCGI_WEB_SERVER_ADDRS`, a comma-separated list of IPv4 addresses (FastCGI specification 1.0,
    /// section 3.2). IPv6 addresses and host names are accepted too, because web servers are configured with them;
    /// `resolve` returns the addresses of a name. Peers on Unix sockets are never in the set.
    ///
    /// # Errors
    /// Returns a message for the operator if an element is invalid, because an incomplete list would admit or refuse
    /// the wrong peers.
    pub(crate) fn web_servers(variable: &str, resolve: impl Fn(&str) -> Vec<IpAddr>) -> Result<Option<Self>, String> {
        let one = |address: IpAddr| {
            let address = address.to_canonical();
            PeerPattern::Network { address, bits: if address.is_ipv4() { 32 } else { 128 } }
        };
        if variable.trim().is_empty() {
            return Ok(None);
        }
        let mut members = Vec::new();
        for text in variable.split(',').map(str::trim) {
            let addresses = match text.parse() {
                Ok(address) => vec![address],
                Err(_) if text.is_empty() => Vec::new(),
                Err(_) => resolve(text),
            };
            if addresses.is_empty() {
                return Err(format!(
                    "'{text}' in FCGI_WEB_SERVER_ADDRS is neither an address nor a name that resolves to one (expected a \
                     list such as 192.0.2.1,192.0.2.2; or unset the variable and use --allow)"
                ));
            }
            members.extend(addresses.into_iter().map(one));
        }
        Ok(Self::new(members))
    }

    /// Whether `peer` is in the set; `None` is a peer on a Unix socket.
    pub(crate) fn contain(&self, peer: Option<IpAddr>) -> bool {
        let peer = peer.map(|peer| peer.to_canonical());
        self.0.iter().any(|who| match (who, peer) {
            (PeerPattern::Unix, None) => true,
            (PeerPattern::Network { address: IpAddr::V4(network), bits }, Some(IpAddr::V4(peer))) => {
                same_start(u32::from(*network).into(), u32::from(peer).into(), 32 - bits)
            }
            (PeerPattern::Network { address: IpAddr::V6(network), bits }, Some(IpAddr::V6(peer))) => {
                same_start((*network).into(), peer.into(), 128 - bits)
            }
            _ => false,
        })
    }
}

/// Whether two addresses differ only in their last `host_bits` bits.
fn same_start(one: u128, other: u128, host_bits: u32) -> bool {
    (one ^ other).checked_shr(host_bits).unwrap_or(0) == 0
}

impl fmt::Display for PeerPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix => f.write_str("unix"),
            Self::Network { address, bits } => write!(f, "{address}/{bits}"),
        }
    }
}

impl FromStr for PeerPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "expected an address or a network, as in 192.0.2.1, 10.0.0.0/8 or fd00::/8, or unix";
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| format!("'{address}' is not an address ({FORM})"))?;
        if address.to_canonical() != address {
            // IPv4 peers are compared in IPv4 notation.
            let address = address.to_canonical();
            return Err(format!("'{text}' is an IPv4 address in IPv6 notation (write it as {address})"));
        }
        let size = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => size,
            Some(bits) => bits
                .parse()
                .ok()
                .filter(|&number: &u32| number <= size && bits.bytes().all(|byte| byte.is_ascii_digit()))
                .ok_or(format!("'/{bits}' is not a prefix length, 0 to {size} bits ({FORM})"))?,
        };
        let network = match address {
            IpAddr::V4(address) => u128::from(u32::from(address)),
            IpAddr::V6(address) => address.into(),
        };
        // Bits beyond the prefix are probably a typo. Ignoring them would admit more peers than intended.
        if network & 1_u128.checked_shl(size - bits).map_or(u128::MAX, |above| above - 1) != 0 {
            return Err(format!("'{text}' names an address within the network, not its first one ({FORM})"));
        }
        Ok(Self::Network { address, bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(members: &str) -> Peers {
        Peers::new(members.split(' ').map(|text| text.parse().unwrap()).collect()).unwrap()
    }

    #[test]
    fn a_set_contains_its_networks_and_no_more() {
        let peers = set("10.0.0.0/8 192.0.2.1 fd00::/8 2001:db8::1");
        for inside in ["10.0.0.0", "10.255.255.255", "192.0.2.1", "fd12::1", "2001:db8::1", "::ffff:10.1.2.3"] {
            assert!(peers.contain(Some(inside.parse().unwrap())), "{inside}");
        }
        for outside in ["9.255.255.255", "11.0.0.0", "192.0.2.2", "fe00::1", "2001:db8::2", "::a00:1"] {
            assert!(!peers.contain(Some(outside.parse().unwrap())), "{outside}");
        }
        assert!(!peers.contain(None) && set("unix").contain(None));
        assert!(!set("unix").contain(Some("127.0.0.1".parse().unwrap())));
        let all = set("0.0.0.0/0 ::/0");
        assert!(all.contain(Some("255.255.255.255".parse().unwrap())) && all.contain(Some("ffff::".parse().unwrap())));
        assert!(!set("0.0.0.0/0").contain(Some("::1".parse().unwrap())));
    }

    #[test]
    fn the_error_for_an_invalid_member_names_the_expected_form() {
        for (text, said) in [
            ("localhost", "'localhost' is not an address"),
            ("10.0.0.0/33", "0 to 32 bits"),
            ("::/129", "0 to 128 bits"),
            ("10.0.0.0/+8", "0 to 32 bits"),
            ("10.0.0.0/", "0 to 32 bits"),
            ("10.0.0.1/8", "names an address within the network"),
            ("fd00::1/0", "names an address within the network"),
        ] {
            let error = text.parse::<PeerPattern>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
        for text in ["unix", "10.0.0.0/8", "0.0.0.0/0", "::/0", "fd00::/8"] {
            assert_eq!(text.parse::<PeerPattern>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn web_servers_are_addresses_or_names_and_never_unix() {
        let resolve = |name: &str| match name {
            "localhost" => vec!["::1".parse().unwrap(), "127.0.0.1".parse().unwrap()],
            _ => Vec::new(),
        };
        let servers = |variable: &str| Peers::web_servers(variable, resolve);
        let peers = servers("192.0.2.1, 192.0.2.2").unwrap().unwrap();
        assert!(peers.contain(Some("192.0.2.2".parse().unwrap())) && !peers.contain(None));
        assert!(!peers.contain(Some("192.0.2.3".parse().unwrap())));
        let peers = servers("localhost,2001:db8::1,::ffff:192.0.2.1").unwrap().unwrap();
        for inside in ["127.0.0.1", "::1", "2001:db8::1", "192.0.2.1"] {
            assert!(peers.contain(Some(inside.parse().unwrap())), "{inside}");
        }
        assert!(!peers.contain(Some("127.0.0.2".parse().unwrap())) && !peers.contain(None));
        assert_eq!(servers(""), Ok(None));
        for wrong in ["192.0.2.1,", "nowhere", "192.0.2.1/24"] {
            assert!(servers(wrong).unwrap_err().contains("is neither an address nor a name"), "{wrong}");
        }
    }
}
