//! Why a look-up ended as it did.

/// What the kernel is told to do with a look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// The kernel goes on as it would without the balancer (`SK_PASS`, no socket chosen). On a
    /// virtual port it finds nobody then, and answers a SYN with RST.
    Pass = 0,
    /// The look-up ends at the socket that was chosen (`SK_PASS` after `bpf_sk_assign`).
    Steer = 1,
    /// The look-up finds nobody (`SK_DROP`): a SYN is answered with RST.
    Refuse = 2,
}

impl Verdict {
    /// The word for it in JSON and in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Steer => "steer",
            Self::Refuse => "refuse",
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $own:ident / $virtual:ident, $meaning:literal;)*) => {
        #[allow(clippy::doc_markdown, reason = "the meanings are sentences for people, not documentation")]
        /// Every way a look-up for a service's port can end. Counters, JSON names, log words and
        /// docs derive from it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason {
            $($(#[$doc])* #[doc = $meaning] $variant,)*
        }

        impl Reason {
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

            /// What the kernel is told with this reason. On a virtual port nobody else listens: who
            /// is let in there is given a backend.
            pub const fn verdict(self, virtual_port: bool) -> Verdict {
                let (own, on_virtual) = match self {
                    $(Self::$variant => (Verdict::$own, Verdict::$virtual)),*
                };
                if virtual_port { on_virtual } else { own }
            }
        }
    };
}

// The verdict on an own port / on a virtual one.
reasons! {
    Exempt = "exempt", Pass / Steer, "the source is exempt: let through without admission";
    Admitted = "admitted", Steer / Steer, "own port: the listener had room";
    Steered = "steered", Steer / Steer, "virtual port: steered to a backend with room";
    OverQuota = "over-quota", Refuse / Refuse, "every backend that could take it is at its quota";
    OverQuotaCookie = "over-quota-cookie", Refuse / Refuse, "every backend is at its quota while SYN cookies are in use: the RST may come after the client's connect";
    AcceptQueueFull = "accept-queue-full", Refuse / Refuse, "the backends with room do not accept: their accept queues have been full for more than a second";
    AcceptQueueGrace = "accept-queue-grace", Steer / Steer, "only a backend with a momentarily full accept queue was left: the kernel drops the SYN and the client tries again";
    AvoidedBackend = "avoided-backend", Steer / Steer, "only a backend that is avoided (stalled, hung or failing) had room: health alone refuses nobody";
    ClosedByHand = "closed-by-hand", Refuse / Refuse, "every backend was closed by hand (quota set to 0)";
    NoBackend = "no-backend", Pass / Pass, "no live backend is known, or the kernel takes none: it decides alone, as without the balancer";
    FailOpenStale = "fail-open-stale", Steer / Steer, "it would have been refused, but the daemon has not lived for fail_open_after: let in";
    FailOpenQuota = "fail-open-quota", Steer / Steer, "it would have been refused, but the computed quotas add up to far less than what is established, so what they were computed from is wrong: let in";
    FailOpenFull = "fail-open-full", Steer / Steer, "it would have been refused, but listeners of the service serve without the balancer because a map is full: let in";
    FailOpenError = "fail-open-error", Pass / Steer, "it was not judged to the end: the kernel did not take a backend that had room, or more had to be looked at than one SYN may cost, or no memory was free for it: let in";
    CountOnly = "count-only", Pass / Pass, "the mode is count: connections are counted, and the kernel decides alone";
    ForeignSkLookup = "foreign-sk-lookup", Pass / Pass, "another sk_lookup program has chosen the socket";
}

impl Reason {
    /// The reason of a counter's index.
    pub fn from_index(index: usize) -> Option<Self> {
        Self::ALL.get(index).copied()
    }

    /// The index of its counter, below [`crate::abi::REASON_SLOTS`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

const _: () = assert!(Reason::ALL.len() <= crate::abi::REASON_SLOTS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_indexes_are_unique_and_round_trip() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index);
            assert_eq!(Reason::from_index(index), Some(*reason));
            assert_eq!(
                Reason::ALL
                    .iter()
                    .filter(|other| other.name() == reason.name())
                    .count(),
                1
            );
            assert!(
                reason
                    .name()
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
            );
        }
        assert_eq!(Reason::from_index(Reason::ALL.len()), None);
    }
}
