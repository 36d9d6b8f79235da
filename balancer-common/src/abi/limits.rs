//! How many there can be, and the numbers that stand for none or for any.

/// Most services.
pub const MAX_SERVICES: usize = 64;
/// Most backends of all services together.
pub const MAX_SLOTS: usize = 1024;
/// Most backends of one service.
pub const MAX_MEMBERS: usize = 256;
/// Most slots that rules for any netns give away. The others are for the netns that the daemon
/// guards by name.
pub const MAX_SLOTS_OF_ANY_NETNS: u32 = 768;
/// Most unconfirmed candidates, together.
pub const MAX_CANDIDATES: u32 = 128;
/// Most unconfirmed candidates of one netns.
pub const MAX_CANDIDATES_OF_NETNS: u32 = 32;
/// Most unconfirmed candidates of a netns that has a confirmed backend, whatever others have.
pub const MAX_CANDIDATES_BESIDE_CONFIRMED: u32 = 64;
/// Most connections that are counted on an unconfirmed candidate: a socket's storage is kernel
/// memory.
pub const MAX_CONNECTIONS_OF_CANDIDATE: u32 = 1_024;
/// Words of a service's bitmap of slots.
pub const MEMBER_WORDS: usize = MAX_SLOTS / 64;
/// Counters a service has in VERDICTS.
pub const REASON_SLOTS: usize = 16;
/// Most refused sources that are remembered until the daemon takes them. Far below 128 for each
/// CPU the kernel forgets earlier: CPUs set entries aside (`LOCAL_FREE_TARGET`,
/// `kernel/bpf/bpf_lru_list.c`).
pub const MAX_REFUSED_SOURCES: usize = 4_096;
/// A quota that never refuses.
pub const UNLIMITED: u32 = u32::MAX;
/// The service id that names none.
pub const NO_SERVICE: u16 = u16::MAX;
/// The netns in a key that fits any netns: no cookie is 0.
pub const ANY_NETNS: u64 = 0;
/// Weight of a backend when nothing else is said.
pub const DEFAULT_WEIGHT: u32 = 1;
/// Longest name of a service, in bytes.
pub const MAX_NAME: usize = 63;
/// Most endpoints of all groups together. The bitmap of a group is a [`Members`](super::Members).
pub const MAX_ENDPOINTS: usize = MAX_SLOTS;
/// Most endpoint groups.
pub const MAX_ENDPOINT_GROUPS: usize = 64;
/// Most frontends.
pub const MAX_FRONTENDS: usize = 1_024;
/// Most network namespaces whose connects are left alone.
pub const MAX_EXCLUDED_NETNS: usize = 1_024;
/// Counters an endpoint group has in `PLACE_VERDICTS`.
pub const PLACE_REASON_SLOTS: usize = 16;
