//! Why a connect to a frontend ended as it did.

use crate::abi::{Excluded, Frontend};

macro_rules! reasons {
    ($($variant:ident = $name:literal, $placed:literal, $meaning:literal;)*) => {
        #[allow(clippy::doc_markdown, reason = "the meanings are sentences for people, not documentation")]
        /// Every way a `connect()` to a frontend can end. Counters, JSON names, log words and docs
        /// derive from it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum PlaceReason {
            $(#[doc = $meaning] $variant,)*
        }

        impl PlaceReason {
            /// All of them, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in JSON, in the CLI and in the logs.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// What it means for the client, in one sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning),* }
            }

            /// Whether the destination was changed.
            pub const fn is_placed(self) -> bool {
                match self { $(Self::$variant => $placed),* }
            }
        }
    };
}

reasons! {
    Placed = "placed", true, "sent to the endpoint that should have it";
    PlacedOnAvoided = "placed-on-avoided", true, "connects to every endpoint failed of late: sent to one of them all the same";
    DryRun = "dry-run", false, "an endpoint was chosen and counted, but the mode is dry-run: the destination is left as it is";
    NotTcp = "not-tcp", false, "it is no TCP socket";
    Stale = "fail-open-stale", false, "the daemon has not lived for fail_open_after: the destination is left as it is";
    Unknown = "fail-open-unknown", false, "nothing fresh is known of the endpoints: the destination is left as it is";
    Excluded = "excluded", false, "connects of this pod are left alone, because it is annotated so";
    Sidecar = "sidecar", false, "a sidecar captures what leaves this network namespace: it chooses itself";
    NoEndpoint = "no-endpoint", false, "no endpoint of this address family takes connections: the destination is left as it is";
    Error = "fail-open-error", false, "the kernel had no memory for the socket's storage: the destination is left as it is";
    OwnAddress = "own-address", false, "another pod of the Service, or the node itself, connects to a pod's own address: it means that pod";
}

impl PlaceReason {
    /// Why a connect to a frontend with these flags is left alone in a netns that has that value in
    /// `EXCLUDED_NETNS`; `None`: it is not.
    #[inline(always)]
    pub const fn of_excluded(value: u32, flags: u32) -> Option<Self> {
        match Excluded::from_number(value) {
            Excluded::Everywhere => Some(Self::Excluded),
            Excluded::OwnAddresses if flags & Frontend::OWN_ADDRESS != 0 => Some(Self::OwnAddress),
            Excluded::OwnAddresses => None,
        }
    }

    /// The reason of a counter's index.
    pub fn from_index(index: usize) -> Option<Self> {
        Self::ALL.get(index).copied()
    }

    /// The index of its counter, below [`crate::abi::PLACE_REASON_SLOTS`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

const _: () = assert!(PlaceReason::ALL.len() <= crate::abi::PLACE_REASON_SLOTS);

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_and_indexes_are_unique_and_round_trip() {
        let names: BTreeSet<_> = PlaceReason::ALL.iter().map(|one| one.name()).collect();
        assert_eq!(names.len(), PlaceReason::ALL.len());
        for (index, reason) in PlaceReason::ALL.iter().enumerate() {
            assert_eq!(PlaceReason::from_index(index), Some(*reason));
            assert_eq!(reason.index(), index);
        }
        assert_eq!(PlaceReason::from_index(PlaceReason::ALL.len()), None);
    }

    #[test]
    fn who_means_an_endpoint_is_left_alone_there_and_nowhere_else() {
        let own = Frontend::OWN_ADDRESS | Frontend::DRY_RUN;
        let of = |excluded: Excluded, flags| PlaceReason::of_excluded(excluded as u32, flags);
        let everywhere = Some(PlaceReason::Excluded);
        assert_eq!(of(Excluded::Everywhere, 0), everywhere);
        assert_eq!(of(Excluded::Everywhere, own), everywhere);
        assert_eq!(of(Excluded::OwnAddresses, Frontend::DRY_RUN), None);
        assert_eq!(
            of(Excluded::OwnAddresses, own),
            Some(PlaceReason::OwnAddress)
        );
        for unknown in [0, 3, u32::MAX] {
            assert_eq!(PlaceReason::of_excluded(unknown, 0), everywhere);
        }
    }
}
