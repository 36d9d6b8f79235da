//! Addresses, and the keys that are made of them.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP address as the maps hold it: 16 bytes, IPv4 as `::ffff:a.b.c.d`, all zero for "any".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// Any address: what a wildcard listener is bound to.
    pub const ANY: Self = Self([0; 4]);

    /// Any IPv4 address, as a packet would have it.
    pub const ANY_V4: Self = Self::from_v4_be(0);

    /// An IPv4 address given as in the packet (network byte order).
    #[inline(always)]
    pub const fn from_v4_be(address: u32) -> Self {
        Self([0, 0, 0x0000_ffff_u32.to_be(), address])
    }

    /// Whether it is the wildcard of either family.
    #[inline(always)]
    pub const fn is_any(&self) -> bool {
        self.0[0] == 0
            && self.0[1] == 0
            && (self.0[2] == 0 || self.0[2] == 0x0000_ffff_u32.to_be())
            && self.0[3] == 0
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0x0000_ffff_u32.to_be()
    }

    /// The two halves as they stand in memory, for comparing.
    #[inline(always)]
    pub const fn words(&self) -> (u64, u64) {
        (
            (self.0[1] as u64) << 32 | self.0[0] as u64,
            (self.0[3] as u64) << 32 | self.0[2] as u64,
        )
    }

    /// The address that stands in memory as these two halves.
    #[inline(always)]
    pub const fn of_words([high, low]: [u64; 2]) -> Self {
        Self([
            high as u32,
            (high >> 32) as u32,
            low as u32,
            (low >> 32) as u32,
        ])
    }

    /// The upper and the lower half as numbers, for hashing.
    #[inline(always)]
    pub const fn halves(&self) -> (u64, u64) {
        (
            (self.0[0] as u64) << 32 | self.0[1] as u64,
            (self.0[2] as u64) << 32 | self.0[3] as u64,
        )
    }
}

impl Address {
    /// An address as it stands in a packet: unlike with `From`, 0.0.0.0 is an IPv4 address here,
    /// not "any".
    pub fn of_packet(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::from_v4_be(u32::from(v4).to_be()),
            IpAddr::V6(_) => address.into(),
        }
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let v6 = match address {
            IpAddr::V4(v4) if v4.is_unspecified() => Ipv6Addr::UNSPECIFIED,
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let octets = v6.octets();
        let word = |at: usize| {
            u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]])
        };
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(address.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        let v6 = Ipv6Addr::from(octets);
        v6.to_ipv4_mapped()
            .map_or(Self::V6(v6), |v4: Ipv4Addr| Self::V4(v4))
    }
}

/// Key of SERVICES and `LISTEN_RULES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct PortKey {
    /// Cookie of the netns, or [`ANY_NETNS`](super::ANY_NETNS).
    pub netns: u64,
    /// The address, or [`Address::ANY`].
    pub address: Address,
    /// The port, host byte order (32 bits, so that the key has no padding).
    pub port: u32,
    /// Always 0.
    pub zero: u32,
}

impl PortKey {
    /// The key of an address and port in a netns.
    #[inline(always)]
    pub const fn new(netns: u64, address: Address, port: u16) -> Self {
        Self {
            netns,
            address,
            port: port as u32,
            zero: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for text in ["127.0.0.1", "::1", "10.1.2.3", "2001:db8::7"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(address)), address);
        }
        assert!(Address::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)).is_any());
        assert_eq!(
            Address::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            Address::ANY
        );
        let mapped = Address::from_v4_be(u32::from_ne_bytes([10, 1, 2, 3]));
        assert_eq!(mapped, Address::from("10.1.2.3".parse::<IpAddr>().unwrap()));
        assert!(mapped.is_v4());
    }
}
