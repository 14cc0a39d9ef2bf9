//! Checks the decoder of the PROXY protocol's header.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Dice, Pieces};
use crate::protocol::proxy::{Header, Opening, Source, decode};

/// Decodes arbitrary bytes as the start of a connection, and prefixes of them. Then writes a header
/// chosen by the bytes, and reads it.
///
/// # Panics
/// Panics if the result for a prefix contradicts the result for a longer prefix, if a header is longer than the input,
/// or if the written header is not read back unchanged.
pub fn proxy(data: &[u8]) {
    let whole = decode(data);
    match whole {
        Ok(Opening::Header(header)) => {
            assert!(header.length <= if data[0] == b'P' { 107 } else { 4096 }, "it is within what the text allows");
            assert_eq!(decode(&data[..header.length]), whole, "what follows a header does not matter");
            assert_eq!(decode(&data[..header.length - 1]), Ok(Opening::Incomplete), "it has no byte too many");
        }
        Ok(Opening::Incomplete) => assert!(data.len() < 4096, "no more is waited for"),
        Ok(Opening::Other) | Err(_) => {}
    }
    let (mut pieces, mut rest) = (Pieces::of(data), data);
    for _ in 0..8 {
        if rest.is_empty() {
            break;
        }
        pieces.cut(&mut rest);
        let early = decode(&data[..data.len() - rest.len()]);
        assert!(early == whole || early == Ok(Opening::Incomplete), "{early:?} is taken back");
    }
    written(Dice(data));
}

fn written(mut dice: Dice<'_>) {
    let mut octets = [0; 32];
    for octet in &mut octets {
        *octet = dice.byte();
    }
    let [source, destination] = [0, 16].map(|at| Ipv6Addr::from(octets.as_chunks::<16>().0[at / 16]));
    let first_four = |address: Ipv6Addr| Ipv4Addr::from(*address.octets().first_chunk::<4>().unwrap_or(&[0; 4]));
    let ports = [(); 2].map(|()| u16::from_be_bytes([dice.byte(), dice.byte()]));
    let (source, destination) = match dice.coin(2) {
        true => (IpAddr::V4(first_four(source)), IpAddr::V4(first_four(destination))),
        false => (IpAddr::V6(source), IpAddr::V6(destination)),
    };
    let mut is_tls = false;
    let bytes = if dice.coin(2) {
        let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
        format!("PROXY {family} {source} {destination} {} {}\r\n", ports[0], ports[1]).into_bytes()
    } else {
        let mut block = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => [source.octets(), destination.octets()].concat(),
            (IpAddr::V6(source), IpAddr::V6(destination)) => [source.octets(), destination.octets()].concat(),
            _ => return,
        };
        block.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        while !dice.is_empty() && block.len() < 3000 {
            let (kind, value) = (if dice.coin(2) { 0x20 } else { dice.byte() }, dice.bytes());
            if kind == 0x20 {
                let Some(flags) = value.first() else { continue };
                is_tls = flags & 1 == 1;
            }
            block.push(kind);
            block.extend(u16::try_from(value.len()).unwrap_or(0).to_be_bytes());
            block.extend(value);
        }
        let family = if source.is_ipv4() { 0x11 } else { 0x21 };
        let length = u16::try_from(block.len()).unwrap_or(0).to_be_bytes();
        [b"\r\n\r\n\0\r\nQUIT\n", &[0x21, family][..], &length, &block].concat()
    };
    let header = Header { length: bytes.len(), source: Source::Inet(SocketAddr::new(source, ports[0])), is_tls };
    assert_eq!(decode(&bytes), Ok(Opening::Header(header)), "{bytes:?}");
}
